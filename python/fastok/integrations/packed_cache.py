"""``PackedCache``: transformers' cache with packed keys and values, which fastok's attention reads in place."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..caches.formats import KVFormat
from ..caches.packed import PackedKV, kv_pack
from ..ops.attention import attention_scores
from ..ops.checks import check_shape
from ..ops.decode import attention_decode
from ..ops.quantize import check_marks
from ..ops.scores import ScoreSpec
from ..ops.select import top_tokens
from .compiled_step import cache_step, register
from .held_cache import HeldCache, HeldLayer, Store
from .unpadded import Unpadded

RECENT, RANDOM = 0.05, 0.05
"""ZipCache's probes, as shares of the prompt's tokens."""


class PackedCache(HeldCache):
    """Keys and values in 1.5 to 8 bits behind transformers' cache interface.

    ::

        fastok.register_transformers()
        model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fastok")
        model.generate(**inputs, past_key_values=fastok.PackedCache("kivi-2", model))

    Args:
        fmt: a `KVFormat` or the name of a preset.
        model_or_config: the model it is for, or its config: whether the format can hold its heads is checked at once
            then, rather than at the first update.
        check: refuse keys and values that are NaN or inf, by a ValueError, rather than have them spoil their groups.
            Looks at all of them, which on CUDA waits for the device.
        salient: bool ``[B,T]``, for formats of two classes: which tokens of the prompt are of the high class, in every
            layer and head. May be set later, as an attribute, until the prompt comes; samples may be repeated then, as
            beams are. A prompt may come in chunks. See also `fastok.protect_semantics`.

    Raises:
        TypeError, ValueError: arguments of another kind.

    A prompt attends to its exact keys and values and is packed afterwards. From then on up to 16 new tokens at a time
    attend to the packed bytes in place, with ``attn_implementation="fastok"``. More of them (a further turn of a
    conversation, chunked prefill), windows on several new tokens, recorded scores, and any other attention
    implementation get an unpacked copy of one layer at a time (the last with a warning): right, but with that much
    memory and time. Tokens are packed once and never again; heads narrower than 32 channels are padded with zeros, and
    where keys and values have different widths, the narrower ones, which then take the memory of the wider.
    What the mask hides of a prompt (padding, left or right) is not stored, so that a sequence's pages are, byte for
    byte, those that it has without padding. That takes ``attn_implementation="fastok"``, and concerns the first
    forward: later chunks and turns are stored as they are, padding included.
    Formats of two classes (``"zipcache-4/2"``, ``"vidkv-1.5/1.66"``) find the salient tokens of the prompt, of which
    they have the share ``format.salient``, by probing its attention, unless they are given; with another attention
    implementation they must be given, or all tokens are of the class ``format.later``.

    Works with batches (left or right padding), beam search, ``crop``, `reset` and continued conversations. Not for
    training. ``torch.compile(fullgraph=True)`` of decode steps works where the prompt was not compiled, with the model
    given here and ``attn_implementation="fastok"``: a layer's step, sealing included, is one op of the graph, compiled
    once for the first length and once for all others.
    """

    def __init__(
        self, fmt: KVFormat | str, model_or_config: Any = None, *, check: bool = False, salient: Tensor | None = None
    ) -> None:
        self.format = KVFormat.of(fmt)
        self._marks = Marks()
        self.salient = salient
        self._config: Any = None
        if model_or_config is not None:
            self._check_heads(getattr(model_or_config, "config", model_or_config))
            self._config = getattr(model_or_config, "config", model_or_config)
        super().__init__(partial(_layer, self.format, check, self._marks))

    @property
    def salient(self) -> Tensor | None:
        """See the class."""
        return self._marks.salient

    @salient.setter
    def salient(self, salient: Tensor | None) -> None:
        if salient is not None:
            check_marks(salient, self.format.two_classes)
            check_shape("salient", salient, (None, None), "[B,T]")
        self._marks.salient = salient

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values ``[B,G,S,D]`` of a layer; what the attention function is to be given."""
        if torch.compiler.is_compiling() and getattr(self._config, "_attn_implementation", None) != "fastok":
            raise NotImplementedError(
                "PackedCache in torch.compile: required, the model among its arguments, with "
                "attn_implementation='fastok'; others unpack the cache, which only works uncompiled"
            )
        result: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return result

    def _check_heads(self, config: Any) -> None:
        if not hasattr(config, "get_text_config"):
            raise TypeError(f"model_or_config must be a transformers model or its config, got {config!r}")
        text = config.get_text_config(decoder=True)
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.format.layout(_stored_width(width))

    @property
    def bits_per_element(self) -> float:
        """Bits stored for each element of a key or value, the hot window's included; NaN while empty."""
        nbytes = self.nbytes
        elements = sum(int(layer.kv.seq_lens.sum()) * sum(layer.widths) for layer in self.filled())
        return 8 * nbytes / elements if elements else math.nan

    def summary(self) -> str:
        """One line: format, tokens, memory."""
        dense = sum(layer.kv.hot_len.numel() * layer.length * sum(layer.widths) * layer.kv.hot_k.element_size()
                    for layer in self.filled())  # fmt: skip
        layers = list(self.filled())
        if not layers:
            return f"PackedCache, empty: {self.format}"
        return (
            f"PackedCache of {len(layers)} layers, {layers[0].length} tokens, {self.nbytes / 2**20:.1f} MiB, "
            f"{self.bits_per_element:.2f} bits per element ({dense / max(self.nbytes, 1):.1f}x less than dense): "
            f"{self.format.describe(layers[0].kv.width)}"
        )


@dataclass
class Marks:
    """What the layers of a cache are told about the prompt: its salient tokens, bool ``[B,T]``."""

    salient: Tensor | None = None

    def of(self, keys: Tensor, first: int = 0) -> Tensor | None:
        """The same for every head, ``[B,G,S]``, of tokens from ``first`` on with keys ``[B,G,S,D]``; None behind T."""
        batch, groups, total, _ = keys.shape
        if self.salient is None or first >= self.salient.shape[1]:
            return None
        if self.salient.shape[1] < first + total or not len(self.salient) or batch % len(self.salient):
            raise ValueError(
                f"salient must be [B,T] of the prompt, at least [{batch}, {first + total}]; got "
                f"{list(self.salient.shape)}"
            )
        rows = self.salient[:, first : first + total].to(keys.device).repeat_interleave(batch // len(self.salient), 0)
        return rows[:, None].expand(batch, groups, total)


def _layer(fmt: KVFormat, check: bool, marks: Marks, index: int) -> "PackedLayer":
    return PackedLayer(fmt, check, marks)


def _stored_width(width: int) -> int:
    """Channels of a head once zeros are added."""
    return max(32, width + -width % 8)


def _widened(x: Tensor, width: int) -> Tensor:
    """``x`` with zeros for channels it lacks."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


class PackedLayer(HeldLayer):
    """One layer of a `PackedCache`.

    Attributes:
        kv: the packed keys and values, from the first update on.
    """

    kv: PackedKV
    compiles = True

    def __init__(self, fmt: KVFormat, check: bool = False, marks: Marks | None = None) -> None:
        super().__init__()
        self.format, self.check, self.marks = fmt, check, marks or Marks()
        self._which = register(self)
        self._new: tuple[Tensor, Tensor] | None = None
        self._came = 0  # tokens, padding counted; while a compiled step runs, `length` is still without its own
        self._unpadded: Unpadded | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._which = register(self)

    @property
    def stores(self) -> list[Store]:
        """All that is stored."""
        return [self.kv]

    @property
    def batch(self) -> int:
        """How many samples there are."""
        return self.kv.hot_len.shape[0]

    @property
    def wants_prompt(self) -> bool:
        """For its salient tokens and its padding."""
        return True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Get ready for tensors like these."""
        super().lazy_initialization(key_states, value_states)
        self._unpadded, self._came = None, 0
        batch, groups = key_states.shape[:2]
        stored = _stored_width(max(self.widths))
        self.kv = PackedKV(self.format, batch, groups, stored, dtype=self.dtype, device=self.device, check=self.check)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values ``[B,G,S,D]``; what the attention function is to be given."""
        if torch.compiler.is_compiling() and (self.length == 0 or key_states.shape[2] > self.most_rows):
            raise NotImplementedError(
                f"PackedCache in torch.compile: required, {key_states.shape[2]} tokens behind {self.length}; "
                f"supported, steps of up to {self.most_rows} tokens behind a prompt that was not compiled"
            )
        return super().update(key_states, value_states, *args, **kwargs)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Store new tokens ``[B,G,S,D]``."""
        if torch.compiler.is_compiling():
            self._new = keys, values  # which `attend` stores
        else:
            salient = self.marks.of(keys, self._came)
            self.kv.append(*self._rows(keys, values), salient=salient)
            self._came += keys.shape[2]

    def crop_stores(self, length: int) -> None:
        """Forget all but the ``length`` oldest tokens, padding counted."""
        self._came = length
        if self._unpadded is None:
            self.kv.crop(length)
        else:
            self._unpadded, stored = self._unpadded.crop(length)
            self.kv.crop(stored)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Make samples ``indices[B']`` the batch."""
        super().batch_select_indices(indices)
        if self.is_initialized and self._unpadded is not None:
            self._unpadded = self._unpadded.select(indices)

    # ---- for the attention function ----------------------------------------------------------------------------------

    def attend(self, q: Tensor, scale: float, softcap: float | None, key_bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Held`."""
        if self._new is not None:
            (keys, values), self._new = self._new, None
            out, lse = cache_step(self._which, q, keys, values, scale, softcap or 0.0, key_bias)
            return out, lse
        rows = _widened(q, self.kv.width).to(self.dtype)
        if key_bias is not None and self._unpadded is not None:
            key_bias = self._unpadded.of_stored(key_bias)
        out, lse = attention_decode(rows, self.kv, scale=scale, softcap=softcap, key_bias=key_bias)
        return out[..., : self.widths[1]].to(q.dtype), lse

    def step(
        self, q: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float | None, key_bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See `compiled_step.Stepping`."""
        self.append(keys, values)
        return self.attend(q, scale, softcap, key_bias)

    def stored(self) -> tuple[Tensor, Tensor]:
        """All keys and values ``[B,G,T,D]``; 0 for padding of the prompt."""
        k, v = (x[..., :width].transpose(1, 2) for x, width in zip(self.kv.unpack(), self.widths, strict=True))
        if self._unpadded is not None:
            k, v = (self._unpadded.spread(x, self.length) for x in (k, v))
        return k, v

    def observe(self, q: Tensor, k: Tensor, lse: Tensor, masking: dict[str, Any]) -> None:
        """Pack the prompt, told what it attended to: ``q[B,T,H,D]``, ``k[B,T,G,D]``, ``lse[B,H,T]``."""
        assert self._prompt is not None
        prompt, self._prompt = self._prompt, None
        salient, self._came = self.marks.of(prompt[0]), prompt[0].shape[2]
        keys, values = self._rows(*prompt)
        if salient is None and self.format.two_classes:
            salient = _salient(q, k, lse, masking, self.format.salient)
        bias, seq_lens = masking["key_bias"], None
        hidden = bias == -torch.inf if bias is not None and bias.dim() == 2 else None
        if hidden is not None and bool(hidden.any()):
            self._unpadded = unpadded = Unpadded.of(hidden)
            keys, values = (x.gather(1, unpadded.places[..., None, None].expand_as(x)) for x in (keys, values))
            if salient is not None:
                salient = salient.gather(2, unpadded.places[:, None].expand_as(salient))
            seq_lens = unpadded.seen
        self.kv = kv_pack(keys, values, self.format, salient=salient, seq_lens=seq_lens, check=self.check)

    def _rows(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """``[B,G,S,D]`` as the packed cache takes them, ``[B,S,G,width]``."""
        width = self.kv.width
        return _widened(keys, width).transpose(1, 2), _widened(values, width).transpose(1, 2)


def _salient(q: Tensor, k: Tensor, lse: Tensor, masking: dict[str, Any], share: float) -> Tensor:
    """bool ``[B,G,T]``: ZipCache's important tokens of a prompt, by the attention of probing rows."""
    total = q.shape[1]
    recent = math.ceil(RECENT * total)
    generator = torch.Generator().manual_seed(total)
    earlier = torch.randint(max(total - recent, 1), (int(RANDOM * total),), generator=generator)
    rows = torch.cat([earlier, torch.arange(total - recent, total)]).to(q.device)
    spec = ScoreSpec(rows=rows, normalize="causal", heads="group_sum")
    scores = attention_scores(q, k, lse=lse, spec=spec, **masking)
    kept = total - int((1 - share) * total)
    best = top_tokens(scores.flatten(0, 1), kept).view(*scores.shape[:2], -1)
    return torch.zeros(scores.shape, dtype=torch.bool, device=q.device).scatter(2, best, True)
