"""``RazorCache``: retrieval heads keep everything, the others a window and one token for all that left it."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..caches.window import Gone, Window
from ..flash import padded
from ..ops.attention import attention, merge_states
from ..ops.checks import check_at_least
from ..ops.decode import MOST_ROWS, attention_decode
from .dense_layer import DenseLayer
from .held_cache import HeldCache, HeldLayer, Store


class RazorCache(HeldCache):
    """Retrieval heads keep all tokens; the others the first, the newest, and one that stands for all between them.

    ::

        heads = fastok.sparse.retrieval_heads(model)
        model.generate(**inputs, past_key_values=fastok.sparse.RazorCache(heads))

    Args:
        heads: bool ``[layers,G]``, which KV heads keep everything, see :func:`fastok.sparse.retrieval_heads`.
        sink: first tokens that the other heads keep.
        recent: newest tokens that they keep, at least.
        share: they keep the newest ``1/share`` of the prompt if that is more.

    Raises:
        TypeError, ValueError: an argument of another type or range. NotImplementedError, from the model: an attention
        implementation other than ``"fastok"``, recorded scores, sliding windows, gradients.

    The compensation token's key and value are the means of those that left the window (as they are: after rotary
    embedding), running and in fp32; its logit is raised by ln N, so that it counts as N such tokens. Prompts attend
    to everything; several later tokens at once attend to what is kept and to each other. The window's size is settled
    by the first call. Memory shrinks: the other heads have a ring buffer (`nbytes` does not grow with them).

    Works with batches (padding is never a sink and not in the mean), beams, `reset`, and ``crop`` while nothing has
    left the window. Tang et al., "RazorAttention", arXiv 2407.15891.
    """

    def __init__(self, heads: Tensor, *, sink: int = 4, recent: int = 4000, share: int = 5) -> None:
        if not isinstance(heads, Tensor) or heads.dtype != torch.bool or heads.dim() != 2:
            got = f"{heads.dtype} {list(heads.shape)}" if isinstance(heads, Tensor) else type(heads).__name__
            raise TypeError(f"heads must be a bool tensor [layers,G], got {got}")
        check_at_least("sink", sink, 0)
        check_at_least("recent", recent, 1)
        check_at_least("share", share, 1)
        super().__init__(partial(_layer, heads, sink, recent, share))


def _layer(heads: Tensor, sink: int, recent: int, share: int, index: int) -> "RazorLayer":
    if index >= len(heads):
        raise ValueError(f"heads must have a row for every layer, got {len(heads)}")
    return RazorLayer(heads[index], sink, recent, share)


class RunningMean:
    """Mean keys and values of the tokens that are gone, fp32 ``[B,G,D]``, and how many, int64 ``[B]``."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = (x.new_zeros(*x.shape[:2], x.shape[3], dtype=torch.float32) for x in (k, v))
        self.count = torch.zeros(k.shape[0], dtype=torch.int64, device=k.device)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(x.numel() * x.element_size() for x in (self.k, self.v, self.count))

    def add(self, gone: Gone) -> None:
        """Some more tokens."""
        new = gone.counts.sum(1)
        self.count = self.count + new
        share = (1 / self.count.clamp(min=1))[:, None, None]
        weight = gone.counts[:, None, :, None]
        self.k, self.v = (
            mean + ((x.float() * weight).sum(2) - new[:, None, None] * mean) * share
            for mean, x in ((self.k, gone.k), (self.v, gone.v))
        )

    def attend(self, q: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
        """fp32 ``out[B,S,H,D_v]`` and ``lse[B,H,S]`` of attention to so many tokens, all of which are their mean."""
        ratio = q.shape[2] // self.k.shape[1]
        logits = (q.float() * self.k.repeat_interleave(ratio, 1)[:, None]).sum(-1) * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        lse = logits + self.count.log()[:, None, None]  # fp32: ln 0 is -inf
        out = self.v.repeat_interleave(ratio, 1)[:, None].expand(-1, q.shape[1], -1, -1)
        return out.masked_fill((self.count == 0)[:, None, None, None], 0), lse.transpose(1, 2).contiguous()

    def crop(self, length: int) -> None:
        """Nothing to forget: what is gone makes a window refuse."""

    def select(self, index: Tensor) -> None:
        """Make samples ``index[B']`` the batch."""
        self.k, self.v, self.count = (x.index_select(0, index) for x in (self.k, self.v, self.count))


class RazorLayer(HeldLayer):
    """One layer of a `RazorCache`."""

    most_rows = 1 << 30

    def __init__(self, heads: Tensor, sink: int, recent: int, share: int) -> None:
        super().__init__()
        self.heads, self.sink, self.recent, self.share = heads, sink, recent, share
        self.whole_heads, self.others = (mask.nonzero()[:, 0] for mask in (heads, ~heads))
        self.slides = len(self.others) == 0  # the mean has no places that could be hidden
        self.retrieval = DenseLayer()
        self.window: Window
        self.mean: RunningMean
        self._new: tuple[Tensor, Tensor]

    # ---- as caches go ------------------------------------------------------------------------------------------------

    @property
    def stores(self) -> list[Store]:
        """All that is stored."""
        return [self.window, self.mean, *self.retrieval.stores]

    @property
    def batch(self) -> int:
        """How many samples there are."""
        return self.mean.count.shape[0]

    @property
    def wants_prompt(self) -> bool:
        """For its padding, which is no sink."""
        return True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Get ready for tensors like these."""
        super().lazy_initialization(key_states, value_states)
        if key_states.shape[1] != len(self.heads):
            raise ValueError(
                f"heads must have a column for each of {key_states.shape[1]} KV heads, got {len(self.heads)}"
            )
        self.whole_heads, self.others = self.whole_heads.to(self.device), self.others.to(self.device)
        self.retrieval.lazy_initialization(key_states, value_states)
        k, v = (padded(x[:, self.others]) for x in (key_states, value_states))
        self.window = Window(self.sink, max(self.recent, key_states.shape[2] // self.share), k, v)
        self.mean = RunningMean(k, v)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Store new tokens ``[B,G,S,D]``: by `attend`, which knows which of them are padding."""
        self._new = keys, values

    def _store(self, keys: Tensor, values: Tensor, hidden: Tensor | None) -> None:
        self.retrieval.append(keys[:, self.whole_heads], values[:, self.whole_heads])
        k, v = (padded(x[:, self.others]) for x in (keys, values))
        gone = self.window.push(k, v, hidden)
        if gone is not None:
            self.mean.add(gone)

    # ---- for the attention function ----------------------------------------------------------------------------------

    def observe(self, q: Tensor, k: Tensor, lse: Tensor, masking: dict[str, Any]) -> None:
        """See `Held`."""
        assert self._prompt is not None
        prompt, self._prompt = self._prompt, None
        self._store(*prompt, _hidden(masking["key_bias"], q.shape[1]))

    def unpacked(self) -> tuple[Tensor, Tensor]:
        """See `Held`; only for fastok's attention, since other masks do not fit."""
        raise NotImplementedError(
            "RazorCache: required, attn_implementation='fastok' without recorded scores or windows over several queries"
        )

    def attend(self, q: Tensor, scale: float, softcap: float | None, key_bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Held`."""
        keys, values = self._new
        del self._new
        hidden = _hidden(key_bias, q.shape[1])
        heads = [_query_heads(own, q.shape[2] // len(self.heads)) for own in (self.whole_heads, self.others)]
        of_retrieval, others = (q[:, :, own] for own in heads)
        results = []
        if q.shape[1] == 1:  # its own place in the window is known: what is stored is what it sees
            self._store(keys, values, hidden)
            if len(self.others):
                results.append(self._to_window(others, None, None, None, scale, softcap))
        else:
            if len(self.others):
                k, v = keys[:, self.others], values[:, self.others]
                results.append(self._to_window(others, k, v, hidden, scale, softcap))
            self._store(keys, values, hidden)
        if len(self.whole_heads):
            results.append(self.retrieval.attend(of_retrieval, scale, softcap, key_bias))
        order = torch.cat(heads[::-1]).argsort()
        out = torch.cat([one[0][..., : self.widths[1]].to(q.dtype) for one in results], 2)
        return out[:, :, order], torch.cat([one[1] for one in results], 1)[:, order]

    def _to_window(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, hidden: Tensor | None, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        """Queries ``[B,S,H,D]`` of the other heads, over the window, what is gone, and ``k, v[B,G,S,D]`` if given."""
        rows = padded(q).to(self.dtype)
        all_k, all_v, bias = self.window.k, self.window.v, self.window.places()[1]
        if k is not None and v is not None:
            ring_k, ring_v, ring_hidden = self.window.newest()
            sinks, new = slice(0, self.sink), k.shape[2]
            all_k = torch.cat([all_k[:, :, sinks], ring_k, padded(k)], 2)
            all_v = torch.cat([all_v[:, :, sinks], ring_v, padded(v)], 2)
            none = torch.zeros(len(k), 1, dtype=torch.bool, device=k.device)
            known = ((self.window.sink_column < 0, 0), (ring_hidden, ring_k.shape[2]), (hidden, new))
            gone = torch.cat([none.expand(-1, n) if x is None else x for x, n in known], 1)
            bias = torch.zeros(gone.shape, device=k.device).masked_fill(gone, -torch.inf)
        all_k, all_v = all_k.transpose(1, 2), all_v.transpose(1, 2)
        if q.shape[1] <= MOST_ROWS:
            out, lse = attention_decode(rows, (all_k, all_v, None), key_bias=bias, scale=scale, softcap=softcap)
        else:
            out, lse = attention(rows, all_k, all_v, causal=True, key_bias=bias, scale=scale, softcap=softcap)
        more, more_lse = self.mean.attend(rows, scale, softcap)
        return merge_states(out.float(), lse, more, more_lse)


def _query_heads(kv_heads: Tensor, ratio: int) -> Tensor:
    """The query heads of some KV heads, that have ``ratio`` each."""
    return (kv_heads[:, None] * ratio + torch.arange(ratio, device=kv_heads.device)).flatten()


def _hidden(key_bias: Tensor | None, new: int) -> Tensor | None:
    """Bool ``[B,S]``: which of the newest tokens are padding."""
    if key_bias is None:
        return None
    if key_bias.dim() != 2:
        raise NotImplementedError(f"attention_mask: required, {list(key_bias.shape)}; supported, [B,T], of padding")
    return key_bias[:, key_bias.shape[1] - new :] == -torch.inf
