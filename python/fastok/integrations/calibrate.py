"""Double Sparsity's offline calibration: which channels tell what a model's queries attend to, layer by layer."""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.checks import check_int, check_shape
from ..ops.sparse import check_statistic
from ..reference.sparse import channel_statistic, fisher_sums, heaviest, most_discriminating
from .swap import Swaps, calls, rebound


@dataclass(frozen=True, eq=False)
class Calibration:
    """The label channels of every layer of one model.

    Attributes:
        channels: int64 ``[layers, H or G, r]``, best first.
        statistic: what they were chosen by, see `calibrate_channels`.
        model: the model's class and, where it has one, its name or path.
        checksum: tells the model's attention weights from others', whatever dtype they were loaded in.
    """

    channels: Tensor
    statistic: str
    model: str
    checksum: str

    def save(self, path: str | Path) -> None:
        """Write a safetensors file. ImportError without the safetensors package."""
        from safetensors.torch import save_file

        about = {"statistic": self.statistic, "model": self.model, "checksum": self.checksum}
        save_file({"channels": self.channels.contiguous()}, path, {"fastok.calibration": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> "Calibration":
        """Read what `save` wrote. ValueError if the file is no calibration, or one of another model than ``model``."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {}).get("fastok.calibration", "null"))
                channels = file.get_tensor("channels")
        except (SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"path must name a file that Calibration.save wrote, got {path}: {error}") from error
        whole = isinstance(about, dict) and set(about) == {"statistic", "model", "checksum"}
        if not whole or not all(isinstance(text, str) for text in about.values()):
            raise ValueError(f"path must name a file that Calibration.save wrote, got {path}, which says {about!r}")
        if channels.dtype != torch.int64 or channels.dim() != 3 or bool((channels < 0).any()):
            raise ValueError(
                f"path must name a file with channels int64 [layers,H or G,r] from 0, got {path} with "
                f"{str(channels.dtype).removeprefix('torch.')} {list(channels.shape)}"
            )
        loaded = cls(channels, **about)
        if model is not None:
            loaded.check(model)
        return loaded

    def check(self, model: nn.Module) -> None:
        """ValueError unless ``model`` is the one that was calibrated."""
        checksum = _checksum(attention_layers(model))
        if checksum != self.checksum:
            raise ValueError(
                f"model must be the one that was calibrated, {self.model} ({self.checksum[:12]}); got {_name(model)} "
                f"({checksum[:12]})"
            )


def calibrate(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    r: int,
    *,
    statistic: str = "qk",
    compat: bool = False,
) -> Calibration:
    """Run ``model`` over ``batches`` and note the channels that tell best which keys its queries attend to.

    Args:
        model: a transformers causal language model (or its decoder) with separate query and key projections.
        batches: token ids ``[B,S]``, or the model's keyword arguments; tokens that an ``attention_mask`` hides do not
            count. Published: 256 documents of the Pile's validation set in blocks of 512 tokens.
        r: channels per head, within [1, D].
        statistic: published: ``"qk"`` after rotary embedding; ``"q"`` or ``"k"``, the projections' outputs. Not
            published: ``"fisher"``, see :func:`fastok.sparse.calibrate_channels`, with the layers' own scale (a
            window or softcap of theirs is left out); each row of a batch is one sequence. On fastok's small language
            model it finds what the published ones miss (README).
        compat: as released, where a wrong key makes ``"qk"`` forget all batches but the last.

    Raises:
        TypeError: no attention layers of that kind in the model (names what is required). ValueError: no batch, or an
            argument out of range.

    Sums over all batches in fp64. The model is left as it was, in its training mode; no gradients.
    """
    check_int("r", r)
    check_statistic(statistic)
    attentions = attention_layers(model)
    head_dim = attentions[0].head_dim
    if not 1 <= r <= head_dim:
        raise ValueError(f"r must be within [1, D={head_dim}], got {r}")
    counters = [_Counter(statistic, getattr(attention, "scaling", None)) for attention in attentions]
    swaps, hooks = Swaps(), []
    seen = 0
    try:
        for attention, counter in zip(attentions, counters, strict=True):
            if statistic in ("qk", "fisher"):
                swaps.swap(attention, counter, counting)
            else:
                projection = attention.q_proj if statistic == "q" else attention.k_proj
                hooks.append(projection.register_forward_hook(counter.projected(head_dim)))
        for batch in batches:
            arguments = _arguments(batch)
            mask = arguments.get("attention_mask")
            for counter in counters:
                counter.mask = mask
                if compat and statistic == "qk":
                    counter.total = None
            with torch.no_grad():
                model(**arguments)
            seen += 1
    finally:
        swaps.restore()
        for hook in hooks:
            hook.remove()
    if seen == 0:
        raise ValueError("batches must have at least one batch, got none")
    totals = [counter.total for counter in counters]
    if any(total is None for total in totals):
        raise TypeError(f"{_name(model)} did not run all of its {len(totals)} attention layers on the batches")
    choose = most_discriminating if statistic == "fisher" else heaviest
    channels = torch.stack([choose(total, r).cpu() for total in totals if total is not None])
    return Calibration(channels, statistic, _name(model), _checksum(attentions))


def _arguments(batch: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's keyword arguments for a batch."""
    if isinstance(batch, Tensor):
        check_shape("batches", batch, (None, None), "[B,S] each")
        return {"input_ids": batch}
    if not isinstance(batch, Mapping):
        raise TypeError(f"batches must have tensors or the model's keyword arguments, got {type(batch).__name__}")
    return dict(batch)


class _Counter:
    """Adds up one layer's statistic."""

    def __init__(self, statistic: str, scale: float | None) -> None:
        self.statistic = statistic
        self.scale = scale
        self.total: Tensor | None = None
        self.mask: Tensor | None = None

    def add(self, q: Tensor, k: Tensor) -> None:
        """Of ``[B,S,H,D]`` and ``[B,S,G,D]``."""
        there = None if self.mask is None else self.mask[:, -q.shape[1] :].to(q.device).bool()
        if self.statistic == "fisher":
            statistic = fisher_sums(q, k, self.scale, there)
        else:
            if there is not None:
                q, k = (x.where(there[:, :, None, None], 0) for x in (q, k))
            statistic = channel_statistic(q, k, self.statistic)
        self.total = statistic if self.total is None else self.total + statistic

    def projected(self, head_dim: int) -> Callable[[nn.Module, Any, Tensor], None]:
        """A forward hook for a projection."""

        def hook(module: nn.Module, arguments: Any, output: Tensor) -> None:
            heads = output.unflatten(-1, (-1, head_dim))
            self.add(heads, heads)

        return hook


class _Interface:
    """In place of ``ALL_ATTENTION_FUNCTIONS`` in the forward of an attention class."""

    def get_interface(self, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        functions = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS
        own: Callable[..., Any] = functions.get_interface(name, default)

        def attend(module: Any, query: Tensor, key: Tensor, *args: Any, **options: Any) -> Any:
            new = key[:, :, key.shape[2] - query.shape[2] :]
            module._fastok.add(query.transpose(1, 2), new.transpose(1, 2))
            return own(module, query, key, *args, **options)

        return attend


_interface = _Interface()


def counting(base: Any) -> dict[str, Any]:
    """For `Swaps.swap`: ``state.add(q[B,S,H,D], k[B,S,G,D])`` in every forward of an attention layer."""
    return {"forward": rebound(base.forward, ALL_ATTENTION_FUNCTIONS=_interface)}


def attention_layers(model: nn.Module) -> list[Any]:
    """The self-attention modules, in the order of their layers."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a transformers language model, got {type(model).__name__} {model!r}")
    found = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "q_proj", None), nn.Module)
        and isinstance(getattr(module, "k_proj", None), nn.Module)
        and isinstance(getattr(module, "layer_idx", None), int)
        and calls(type(module).forward, "ALL_ATTENTION_FUNCTIONS")
    ]
    if not found:
        raise TypeError(
            f"model must have attention layers with q_proj, k_proj and transformers' attention interface (Llama, "
            f"Mistral, Qwen, Gemma and their like); {_name(model)} has none"
        )
    return sorted(found, key=lambda module: module.layer_idx)


def _name(model: nn.Module) -> str:
    path = getattr(getattr(model, "config", None), "_name_or_path", "")
    return f"{type(model).__name__} {path}".strip()


def _checksum(attentions: list[Any]) -> str:
    """Of a sample of every layer's query and key projection, in bf16 so that a model loaded in bf16 has the same."""
    digest = hashlib.sha256()
    for attention in attentions:
        for projection in (attention.q_proj, attention.k_proj):
            weight = projection.weight.detach().flatten()
            sample = weight[:: max(1, weight.numel() // 1024)].to("cpu", torch.bfloat16).contiguous()
            digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
