"""``PackedCache``: transformers' cache with packed keys and values, which fastok's attention reads in place."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..caches.formats import KVFormat
from ..caches.packed import PackedKV, kv_pack
from ..ops.attention import attention_scores
from ..ops.decode import attention_decode
from ..ops.scores import ScoreSpec
from ..ops.select import top_tokens
from .held_cache import HeldCache, HeldLayer, Store

RECENT, RANDOM, UNIMPORTANT = 0.05, 0.05, 0.4
"""ZipCache's probes, as shares of the prompt's tokens, and the share of tokens in the low class."""


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

    Raises:
        TypeError, ValueError: arguments of another kind. NotImplementedError, at the first update: keys and values of
        different widths.

    A prompt attends to its exact keys and values and is packed afterwards. From then on up to 16 new tokens at a time
    attend to the packed bytes in place, with ``attn_implementation="fastok"``. More of them (a further turn of a
    conversation, chunked prefill), windows on several new tokens, recorded scores, and any other attention
    implementation get an unpacked copy of one layer at a time (the last with a warning): right, but with that much
    memory and time. Tokens are packed once and never again; heads narrower than 32 channels are padded with zeros.
    Formats of two classes (``"zipcache-4/2"``) find the salient tokens of the prompt by probing its attention.

    Works with batches (left or right padding), beam search, ``crop``, `reset` and continued conversations. Not for
    training. Not inside ``torch.compile``: its lengths are Python numbers, and every step would compile anew.
    """

    def __init__(self, fmt: KVFormat | str, model_or_config: Any = None) -> None:
        self.format = KVFormat.of(fmt)
        if model_or_config is not None:
            self._check_heads(getattr(model_or_config, "config", model_or_config))
        super().__init__(layer_class_to_replicate=lambda: PackedLayer(self.format))

    def _check_heads(self, config: Any) -> None:
        if not hasattr(config, "get_text_config"):
            raise TypeError(f"model_or_config must be a transformers model or its config, got {config!r}")
        text = config.get_text_config(decoder=True)
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.format.layout(_stored_width(width))

    @property
    def bits_per_element(self) -> float:
        """Bits stored for each element of a key or value, the hot window's included; NaN while empty."""
        elements = sum(2 * layer.kv.hot_len.numel() * layer.length * layer.width for layer in self.filled())
        return 8 * self.nbytes / elements if elements else math.nan

    def summary(self) -> str:
        """One line: format, tokens, memory."""
        dense = sum(2 * layer.kv.hot_len.numel() * layer.length * layer.width * layer.kv.hot_k.element_size()
                    for layer in self.filled())  # fmt: skip
        layers = list(self.filled())
        if not layers:
            return f"PackedCache, empty: {self.format}"
        return (
            f"PackedCache of {len(layers)} layers, {layers[0].length} tokens, {self.nbytes / 2**20:.1f} MiB, "
            f"{self.bits_per_element:.2f} bits per element ({dense / max(self.nbytes, 1):.1f}x less than dense): "
            f"{self.format.describe(layers[0].kv.width)}"
        )


def _stored_width(width: int) -> int:
    """Channels of a head once zeros are added."""
    return max(32, width + -width % 8)


class PackedLayer(HeldLayer):
    """One layer of a `PackedCache`.

    Attributes:
        kv: the packed keys and values, from the first update on.
        width: channels of a head, before padding.
    """

    kv: PackedKV

    def __init__(self, fmt: KVFormat) -> None:
        super().__init__()
        self.format = fmt
        self.width = 0

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
        """For its salient tokens."""
        return self.format.low_bits is not None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Get ready for tensors like these."""
        if key_states.shape[-1] != value_states.shape[-1]:
            raise NotImplementedError(
                f"PackedCache: required, keys of {key_states.shape[-1]} and values of {value_states.shape[-1]} "
                "channels; supported, equally many"
            )
        super().lazy_initialization(key_states, value_states)
        batch, groups, _, self.width = key_states.shape
        self.kv = PackedKV(self.format, batch, groups, _stored_width(self.width), dtype=self.dtype, device=self.device)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Store new tokens ``[B,G,S,D]``."""
        self.kv.append(*self._rows(keys, values))

    # ---- for the attention function ----------------------------------------------------------------------------------

    def attend(self, q: Tensor, scale: float, softcap: float | None, key_bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Held`."""
        rows = F.pad(q, (0, self.kv.width - q.shape[-1])).to(self.dtype)
        out, lse = attention_decode(rows, self.kv, scale=scale, softcap=softcap, key_bias=key_bias)
        return out[..., : self.width].to(q.dtype), lse

    def stored(self) -> tuple[Tensor, Tensor]:
        """All keys and values ``[B,G,T,D]``."""
        k, v = self.kv.unpack()
        return k[..., : self.width].transpose(1, 2), v[..., : self.width].transpose(1, 2)

    def observe(self, q: Tensor, k: Tensor, lse: Tensor, masking: dict[str, Any]) -> None:
        """Pack the prompt, told what it attended to: ``q[B,T,H,D]``, ``k[B,T,G,D]``, ``lse[B,H,T]``."""
        assert self._prompt is not None
        prompt, self._prompt = self._prompt, None
        total = q.shape[1]
        recent = math.ceil(RECENT * total)
        generator = torch.Generator().manual_seed(total)
        earlier = torch.randint(max(total - recent, 1), (int(RANDOM * total),), generator=generator)
        rows = torch.cat([earlier, torch.arange(total - recent, total)]).to(q.device)
        spec = ScoreSpec(rows=rows, normalize="causal", heads="group_sum")
        scores = attention_scores(q, k, lse=lse, spec=spec, **masking)
        kept = total - int(UNIMPORTANT * total)
        salient = torch.zeros(scores.shape, dtype=torch.bool, device=q.device)
        best = top_tokens(scores.flatten(0, 1), kept).view(*scores.shape[:2], -1)
        keys, values = self._rows(*prompt)
        self.kv = kv_pack(keys, values, self.format, salient=salient.scatter(2, best, True))

    def _rows(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """``[B,G,S,D]`` as the packed cache takes them, ``[B,S,G,width]``."""
        more = (0, self.kv.width - self.width)
        return F.pad(keys, more).transpose(1, 2), F.pad(values, more).transpose(1, 2)
