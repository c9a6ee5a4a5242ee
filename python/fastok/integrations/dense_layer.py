"""Layers of caches for transformers whose keys and values are stored as they are."""

from typing import Any

import torch
from torch import Tensor

from ..caches.dense import DenseKV
from ..flash import padded
from ..ops.attention import attention
from ..ops.decode import MOST_ROWS, attention_decode
from ..ops.select import top_tokens
from .held_cache import HeldLayer, Store


class DenseLayer(HeldLayer):
    """Keys and values as they are, in memory that grows seldom; heads padded to a multiple of 8 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.kv = DenseKV()

    @property
    def stores(self) -> list[Store]:
        """All that is stored."""
        return [self.kv]

    @property
    def batch(self) -> int:
        """How many samples there are."""
        return self.kv.k.shape[0]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Get ready for tensors like these."""
        super().lazy_initialization(key_states, value_states)
        self.kv = DenseKV()

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Store new tokens ``[B,G,S,D]``."""
        k, v = (padded(x).transpose(1, 2) for x in (keys, values))
        self.kv.append(k, v)

    def read(self) -> tuple[Tensor, Tensor]:
        """All keys and values ``[B,T,G,D]``, padded, where the model is."""
        return self.kv.k, self.kv.v

    def stored(self) -> tuple[Tensor, Tensor]:
        """All keys and values ``[B,G,T,D]``."""
        k, v = (x[..., :width].transpose(1, 2) for x, width in zip(self.read(), self.widths, strict=True))
        return k, v

    def attend(self, q: Tensor, scale: float, softcap: float | None, key_bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Held`."""
        if q.shape[1] <= MOST_ROWS:
            return self.to_tokens(None, q, scale, softcap, key_bias)
        rows = padded(q).to(self.dtype)
        masking: dict[str, Any] = {"scale": scale, "causal": True, "softcap": softcap, "key_bias": key_bias}
        out, lse = attention(rows, *self.read(), **masking)
        return out[..., : self.widths[1]].to(q.dtype), lse

    def to_tokens(
        self, tokens: Tensor | None, q: Tensor, scale: float, softcap: float | None, key_bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The same, of some tokens ``[B,G|H,K]`` only."""
        rows = padded(q).to(self.dtype)
        cache = (*self.read(), None)
        out, lse = attention_decode(rows, cache, tokens=tokens, scale=scale, softcap=softcap, key_bias=key_bias)
        return out[..., : self.widths[1]].to(q.dtype), lse


class HeadwiseLayer(DenseLayer):
    """A `DenseLayer` whose heads keep different tokens, each head's one after the other.

    Attributes:
        kept: int64 ``[B,G,K]``, where the K first of the stored tokens stood, once some have been evicted.
        covered: how many tokens had come then; later ones are all stored, behind the kept ones.
    """

    most_rows = 1 << 30
    spare = 0
    """Tokens that there is to be room for besides those that are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: Tensor | None = None
        self.covered = 0

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored."""
        return super().nbytes + (0 if self.kept is None else self.kept.numel() * 8)

    @property
    def wants_prompt(self) -> bool:
        """For what its queries attend to."""
        return True

    def store_prompt(self) -> None:
        """Store all of the prompt, which has been attended to."""
        assert self._prompt is not None
        prompt, self._prompt = self._prompt, None
        self.append(*prompt)
        self.kept, self.covered = None, 0

    def keep_best(self, scores: Tensor, k: int) -> Tensor:
        """Of the stored tokens keep those behind the ones that have ``scores[B,G,N]``, and the ``k`` best of these.

        Returns what is kept, as places int64 ``[B,G,K]`` among what was stored, ascending.
        """
        best = top_tokens(scores.flatten(0, 1), k).view(*scores.shape[:2], -1)
        newest = torch.arange(scores.shape[2], self.kv.length, device=best.device).expand(*best.shape[:2], -1)
        places = torch.cat([best, newest], 2)
        stood = torch.arange(self.covered, self.length, device=best.device)
        if self.kept is None:
            self.kept = places
        else:
            self.kept = torch.cat([self.kept, stood.expand(*best.shape[:2], -1)], 2).gather(2, places)
        self.covered = self.length
        self.kv.keep(places, self.spare)
        return places

    def unpacked(self) -> tuple[Tensor, Tensor]:
        """See `Held`; only for fastok's attention, since other masks do not fit."""
        raise NotImplementedError(
            "a cache whose heads keep different tokens: required, attn_implementation='fastok' without recorded scores "
            "or windows over several queries"
        )

    def attend(self, q: Tensor, scale: float, softcap: float | None, key_bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Held`."""
        return super().attend(q, scale, softcap, self.bias_of_stored(key_bias, q.shape[2]))

    def bias_of_stored(self, key_bias: Tensor | None, heads: int) -> Tensor | None:
        """``[B,T]`` or ``[B,H,T]`` of all tokens as ``[B,H,K']`` of those that are stored."""
        if key_bias is None or self.kept is None:
            return key_bias
        bias = key_bias[:, None] if key_bias.dim() == 2 else key_bias
        bias = bias.expand(-1, heads, -1)
        of_head = self.kept.repeat_interleave(heads // self.kept.shape[1], 1)
        return torch.cat([bias.gather(2, of_head), bias[:, :, self.covered :]], 2)

    def crop_stores(self, length: int) -> None:
        """Forget all but the ``length`` oldest tokens; not those that stood among evicted ones."""
        evicted = 0 if self.kept is None else self.covered - self.kept.shape[2]
        if evicted and length < self.covered:
            raise NotImplementedError(
                f"crop: required, to {length} tokens; supported, at least the {self.covered} of which some were evicted"
            )
        super().crop_stores(length - evicted)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Make samples ``indices[B']`` the batch."""
        super().batch_select_indices(indices)
        if self.kept is not None:
            self.kept = self.kept.index_select(0, indices)


def hidden(scores: Tensor, key_bias: Tensor | None, sink: int = 0) -> Tensor:
    """``scores[B,heads,T]``, -inf where a key is hidden from all heads, inf for the first ``sink`` of the others."""
    if key_bias is None:
        return scores
    gone = (key_bias if key_bias.dim() == 2 else key_bias.amax(1)) == -torch.inf
    scores = scores.masked_fill(gone[:, None], -torch.inf)
    return scores.masked_fill((~gone & ((~gone).cumsum(1) <= sink))[:, None], torch.inf) if sink else scores
