"""FlashAttention 2's entry points over fastok's attention: change ``from flash_attn import …`` into ``fastok.flash``.

Names, argument order, defaults and results are those of flash-attn 2.8, and more is served: any device, fp32, gradients
that are always deterministic. One result differs: ``softmax_lse`` is -inf, not +inf, for a row that sees no key, so
that partial results merge (:func:`fastok.merge_states`). Pages may have any size. Not served, and refused by name:
dropout, ALiBi, and, as there, pages together with ``cache_batch_idx`` or ``cache_leftpad``.
Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", ICLR 2024.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops.attention import HEAD_DIMS, attention, check_ascending
from .ops.checks import (
    ACTIVATIONS,
    check_at_least,
    check_dtype,
    check_int,
    check_number,
    check_range,
    check_same_device,
    check_shape,
    check_softcap,
)
from .ops.decode import PagedKV
from .ops.pages import attention_between, attention_paged, check_pages, check_used_pages, write_pages
from .ops.rotary import rotated

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]

INT32_OR_64 = (torch.int32, torch.int64)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Attention of a batch of sequences of equal length.

    Args:
        q: ``[B,S,H,D]`` fp16, bf16 or fp32; D up to 256.
        k, v: ``[B,T,G,D]``, G dividing H.
        dropout_p: 0.
        softmax_scale: of the logits, ``D ** -0.5`` by default.
        causal: aligned to the last query and the last key.
        window_size: keys left and right of each query's own position that it sees; -1 is unbounded.
        softcap: logits become ``softcap * tanh(logits / softcap)``; 0 is none.
        alibi_slopes: None.
        deterministic: accepted; the gradient is deterministic either way.
        return_attn_probs: return ``softmax_lse`` too.

    Returns:
        ``out[B,S,H,D]``; with ``return_attn_probs`` the tuple ``(out, softmax_lse, S_dmask)``: fp32 ``[B,H,S]``, and an
        empty tensor, as there without dropout.

    Raises:
        NotImplementedError: dropout or ALiBi. TypeError, ValueError: as :func:`fastok.attention`.
    """
    _refuse(dropout_p=dropout_p, alibi_slopes=alibi_slopes)
    masking = _masking(q, softmax_scale, causal, window_size, softcap)
    check_shape("q", q, (None, None, None, None), "[B,S,H,D]")
    check_shape("k", k, (None, None, None, q.shape[3]), "[B,T,G,D], D that of q")
    check_shape("v", v, (None, None, None, None), "[B,T,G,D]")
    out, lse = attention(padded(q), padded(k), padded(v), **masking.named)
    out = out[..., : v.shape[-1]]
    return (out, lse, q.new_empty(0)) if return_attn_probs else out


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Attention of packed sequences, each to itself.

    Args:
        q: ``[total_q,H,D]``. k, v: ``[total_k,G,D]``.
        cu_seqlens_q, cu_seqlens_k: int32 ``[sequences + 1]``, where they begin and end.
        max_seqlen_q, max_seqlen_k: lengths of the longest ones.
        block_table: int32 ``[sequences, n]``: k and v are pages ``[pages,P,G,D]``, as for
            :func:`flash_attn_with_kvcache`, and ``cu_seqlens_k`` says only how long each sequence is. Then not
            differentiable.

        The others are as for :func:`flash_attn_func`.

    Returns:
        ``out[total_q,H,D]``; with ``return_attn_probs`` also ``softmax_lse`` fp32 ``[H,total_q]`` and an empty S_dmask.

    Raises:
        NotImplementedError: dropout or ALiBi. TypeError, ValueError: as :func:`fastok.attention`.
    """
    _refuse(dropout_p=dropout_p, alibi_slopes=alibi_slopes)
    masking = _masking(q, softmax_scale, causal, window_size, softcap)
    check_shape("q", q, (None, None, None), "[total_q,H,D]")
    for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_dtype(name, cu_seqlens, (torch.int32,))
        check_shape(name, cu_seqlens, (None,), "[sequences + 1]")
    if block_table is None:
        check_shape("k", k, (None, None, q.shape[2]), "[total_k,G,D], D that of q")
        check_shape("v", v, (None, None, None), "[total_k,G,D]")
        out, lse = attention(
            padded(q), padded(k), padded(v), cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, **masking.named,
        )  # fmt: skip
    else:
        for name, length in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
            check_at_least(name, length, 0)
        lengths = _paged_lengths(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, block_table)
        out, lse = attention_paged(q, PagedKV(k, v, block_table, lengths), cu_seqlens_q, max_seqlen_q, *masking)
    out = out[..., : v.shape[-1]]
    return (out, lse, q.new_empty(0)) if return_attn_probs else out


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention to a cache, into which new keys and values are written first.

    Args:
        q: ``[B,S,H,D]``, D a multiple of 8.
        k_cache, v_cache: ``[B_cache,T,G,D]``, or with ``block_table`` pages ``[pages,P,G,D]``, any P; changed in place
            if ``k`` and ``v`` are given.
        k, v: ``[B,S_new,G,D]``, written behind the ``cache_seqlens`` tokens that each sequence has.
        rotary_cos, rotary_sin: ``[positions, rotary_dim / 2]``. The first rotary_dim channels of the new keys are
            rotated to the positions they get, those of the queries to the positions from ``cache_seqlens`` on (with
            neither ``causal`` nor a window: all to ``cache_seqlens``). Only with ``k`` and ``v``.
        cache_seqlens: how many tokens are in the cache, an int or int32 ``[B]``; None: it is full.
        cache_batch_idx: int32 ``[B]``, which cache entry belongs to each sequence; attention to them costs a copy.
        cache_leftpad: int32 ``[B]``, so many tokens at the beginning of each sequence's cache do not count.
        block_table: int32 ``[B,n]``, the pages of each sequence in order, with room for ``k`` and ``v``; entries behind
            its last page are not looked at. Up to 16 queries without a window, or one with a window, read the pages in
            place (:func:`fastok.attention_decode`); otherwise copies of 4,096 keys of each sequence at a time are
            attended to and merged.
        rotary_interleaved: rotate neighbouring channels rather than the two halves.
        num_splits: accepted; how keys are shared out is decided by shapes.
        return_softmax_lse: return the fp32 ``[B,H,S]`` log-sum-exp too.

        The others are as for :func:`flash_attn_func`; masks are aligned to each sequence's last token.

    Returns:
        ``out[B,S,H,D]``, or ``(out, softmax_lse)``. Not differentiable, no host synchronisation.

    Raises:
        NotImplementedError: ALiBi; rotary embedding with ``cache_leftpad``; ``block_table`` with ``cache_leftpad`` or
        ``cache_batch_idx``.
        TypeError, ValueError: arguments that do not fit each other or the cache.
    """
    _refuse(alibi_slopes=alibi_slopes)
    masking = _masking(q, softmax_scale, causal, window_size, softcap)
    _check_cache(q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad,
                 block_table)  # fmt: skip
    batch, rows = q.shape[:2]
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    entries = cache_batch_idx
    if block_table is None and entries is None and k_cache.shape[0] != batch:
        entries = torch.arange(batch, device=q.device)
    lengths: int | Tensor = capacity if cache_seqlens is None else cache_seqlens
    if k is not None and v is not None:
        if rotary_cos is not None and rotary_sin is not None:
            steps = torch.arange(rows, device=q.device) * (masking.left >= 0 or masking.right >= 0)
            at = _positions(lengths, steps)
            q = rotated(q, rotary_cos[at], rotary_sin[at], rotary_interleaved)
            steps = torch.arange(k.shape[1], device=q.device)
            at = _positions(lengths, steps)
            k = rotated(k, rotary_cos[at], rotary_sin[at], rotary_interleaved)
        _write(k_cache, v_cache, k, v, lengths, entries, block_table)
        lengths = lengths + k.shape[1]
    if entries is not None:
        k_cache, v_cache = k_cache[entries], v_cache[entries]
    if isinstance(lengths, int) and cache_leftpad is None and block_table is None:
        out, lse = attention(q, k_cache[:, :lengths], v_cache[:, :lengths], **masking.named)
        return (out, lse) if return_softmax_lse else out
    last = lengths if isinstance(lengths, Tensor) else torch.full((batch,), lengths, device=q.device)
    queries = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * rows
    if block_table is None:
        first = torch.zeros_like(last) if cache_leftpad is None else cache_leftpad
        out, lse = attention_between(q.flatten(0, 1), k_cache, v_cache, first, last, queries, rows, *masking)
    else:
        pages = PagedKV(k_cache, v_cache, block_table, last)
        out, lse = attention_paged(q.flatten(0, 1), pages, queries, rows, *masking)
    out = out.unflatten(0, (batch, rows))
    lse = lse.unflatten(1, (batch, rows)).transpose(0, 1).contiguous()
    return (out, lse) if return_softmax_lse else out


# ---- arguments -------------------------------------------------------------------------------------------------------


class _Masking(NamedTuple):
    scale: float
    left: int
    right: int
    softcap: float

    @property
    def named(self) -> dict[str, Any]:
        return {"scale": self.scale, "window": (self.left, self.right), "softcap": self.softcap}


def _refuse(dropout_p: float = 0.0, alibi_slopes: Tensor | None = None) -> None:
    if dropout_p != 0:
        raise NotImplementedError(f"dropout_p: required, dropout_p={dropout_p}; supported, 0.0; missing, dropout")
    if alibi_slopes is not None:
        raise NotImplementedError("alibi_slopes: required, ALiBi; supported, None; missing, ALiBi")


def _masking(
    q: Tensor, softmax_scale: float | None, causal: bool, window_size: tuple[int, int], softcap: float
) -> _Masking:
    """Checked, and as one window; the scale is that of the unpadded head dim."""
    check_dtype("q", q, ACTIVATIONS)
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5 if q.dim() and q.shape[-1] else 1.0
    check_number("softmax_scale", softmax_scale)
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(f"window_size must be (left, right), got {window_size!r}")
    for bound in window_size:
        check_int("window_size", bound)
    left, right = (max(bound, -1) for bound in window_size)  # any negative bound is unbounded there
    return _Masking(softmax_scale, left, 0 if causal else right, check_softcap(softcap))


def padded(x: Tensor) -> Tensor:
    """With a head dim that is a multiple of 8, which zeros do not change the attention of."""
    return F.pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else x


# ---- caches ----------------------------------------------------------------------------------------------------------


def _check_cache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None, rotary_cos: Tensor | None,
    rotary_sin: Tensor | None, cache_seqlens: int | Tensor | None, cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None, block_table: Tensor | None,
) -> None:  # fmt: skip
    check_shape("q", q, (None, None, None, None), "[B,S,H,D]")
    batch = q.shape[0]
    if block_table is not None:
        for name, missing in (("cache_batch_idx", cache_batch_idx), ("cache_leftpad", cache_leftpad)):
            if missing is not None:
                raise NotImplementedError(f"{name}: required, {name} of pages; supported, None; missing, with pages")
        check_pages(("k_cache", "v_cache"), q, k_cache, v_cache, block_table, batch)
        capacity = k_cache.shape[1] * block_table.shape[1]
    else:
        for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
            check_dtype(name, cache, (q.dtype,))
            check_shape(name, cache, (None, None, None, None), "[B,T,G,D]")
            check_same_device(name, cache, "q", q.device)
        check_shape("k_cache", k_cache, (None, None, None, q.shape[3]), "[B,T,G,D], D that of q")
        check_shape("v_cache", v_cache, (*k_cache.shape[:3], None), "[B,T,G,D] of k_cache")
        if k_cache.shape[0] < batch and cache_batch_idx is None:
            raise ValueError(f"k_cache must have an entry for each of {batch} sequences, got {k_cache.shape[0]}")
        capacity = k_cache.shape[1]
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.shape[3] % 8 or not 8 <= cache.shape[3] <= 256:
            raise ValueError(f"{name} must have a head dim that is {HEAD_DIMS}; got {cache.shape[3]}")
    if k_cache.shape[2] == 0 or q.shape[2] % k_cache.shape[2]:
        raise ValueError(f"k_cache must have a number of heads that divides {q.shape[2]}, got {k_cache.shape[2]}")
    _check_new(q, k_cache, v_cache, k, v, cache_seqlens)
    _check_rotary(q, k, rotary_cos, rotary_sin, cache_leftpad, capacity)
    of_sequences = {"cache_batch_idx": cache_batch_idx, "cache_leftpad": cache_leftpad}
    if isinstance(cache_seqlens, Tensor):
        of_sequences["cache_seqlens"] = cache_seqlens
    for name, index in of_sequences.items():
        if index is None:
            continue
        check_dtype(name, index, INT32_OR_64)
        check_shape(name, index, (batch,), "[B] of q")
        check_same_device(name, index, "q", q.device)
        if index.device.type == "cpu":  # elsewhere, looking at values would be a wait
            room = capacity - (0 if k is None or name == "cache_leftpad" else k.shape[1])
            check_range(name, index, 0, k_cache.shape[0] if name == "cache_batch_idx" else room + 1)
    if cache_seqlens is not None and not isinstance(cache_seqlens, Tensor):
        check_int("cache_seqlens", cache_seqlens)
        needed = cache_seqlens + (0 if k is None else k.shape[1])
        if not 0 <= cache_seqlens <= needed <= capacity:
            raise ValueError(f"cache_seqlens must fit the cache's {capacity} tokens, got {needed} with k")
    if block_table is not None:
        held = capacity if cache_seqlens is None else cache_seqlens + (0 if k is None else k.shape[1])
        lengths = held if isinstance(held, Tensor) else torch.full((batch,), held, device=q.device)
        check_used_pages(block_table, k_cache.shape[0], k_cache.shape[1], lengths)


def _check_new(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None, cache_seqlens: int | Tensor | None
) -> None:
    if (k is None) != (v is None):
        raise ValueError("k and v must be given together")
    if k is None or v is None:
        return
    if cache_seqlens is None:
        raise ValueError("cache_seqlens must say where k and v are to be written")
    for name, new, cache in (("k", k, k_cache), ("v", v, v_cache)):
        check_dtype(name, new, (q.dtype,))
        check_shape(name, new, (q.shape[0], None, *cache.shape[2:]), f"[B,S_new,G,D] to go with {name}_cache")
        check_same_device(name, new, "q", q.device)
    check_shape("v", v, (*k.shape[:3], None), "[B,S_new,G,D] of k")


def _check_rotary(
    q: Tensor, k: Tensor | None, cos: Tensor | None, sin: Tensor | None, cache_leftpad: Tensor | None, capacity: int
) -> None:
    if k is None and (cos is not None or sin is not None):
        raise ValueError("rotary_cos and rotary_sin need k and v: what is in the cache has been rotated already")
    if (cos is None) != (sin is None):
        raise ValueError("rotary_cos and rotary_sin must be given together")
    if cos is None or sin is None:
        return
    if cache_leftpad is not None:
        raise NotImplementedError(
            "cache_leftpad: required, rotary embedding of padded sequences; supported, either; missing, both"
        )
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        check_dtype(name, table, ACTIVATIONS)
        check_same_device(name, table, "q", q.device)
    if cos.dim() != 2 or cos.shape[1] * 2 > q.shape[-1]:
        raise ValueError(f"rotary_cos must be [positions, at most {q.shape[-1] // 2}], got {list(cos.shape)}")
    check_shape("rotary_sin", sin, tuple(cos.shape), "that of rotary_cos")
    needed = capacity + max(q.shape[1] - (0 if k is None else k.shape[1]), 0)
    if cos.shape[0] < needed:
        raise ValueError(f"rotary_cos must have {needed} positions, as many as the cache; got {cos.shape[0]}")


def _paged_lengths(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, block_table: Tensor
) -> Tensor:
    """How many tokens each sequence has in its pages, all arguments checked."""
    for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_same_device(name, cu_seqlens, "q", q.device)
    if cu_seqlens_q.shape[0] == 0:
        raise ValueError("cu_seqlens_q must be [sequences + 1], got [0]")
    check_shape("cu_seqlens_k", cu_seqlens_k, (cu_seqlens_q.shape[0],), "that of cu_seqlens_q")
    check_pages(("k", "v"), q, k, v, block_table, cu_seqlens_q.shape[0] - 1)
    check_ascending("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    lengths = cu_seqlens_k.diff()
    if lengths.device.type == "cpu":
        check_range("cu_seqlens_q (lengths, at most max_seqlen_q)", cu_seqlens_q.diff(), 0, max_seqlen_q + 1)
        check_range("cu_seqlens_k (lengths)", lengths, 0, block_table.shape[1] * k.shape[1] + 1)
    check_used_pages(block_table, k.shape[0], k.shape[1], lengths)
    return lengths


def _positions(lengths: int | Tensor, steps: Tensor) -> Tensor:
    """``[S]`` or ``[B,S]``: ``steps`` from each sequence's end on."""
    return lengths + steps if isinstance(lengths, int) else lengths[:, None] + steps


def _write(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: int | Tensor, entries: Tensor | None,
    block_table: Tensor | None,
) -> None:  # fmt: skip
    """Puts new tokens behind those of each sequence, in place."""
    if isinstance(lengths, int) and entries is None and block_table is None:
        k_cache[:, lengths : lengths + k.shape[1]] = k
        v_cache[:, lengths : lengths + k.shape[1]] = v
        return
    position = _positions(lengths, torch.arange(k.shape[1], device=k.device)).expand(k.shape[0], -1)
    if block_table is not None:
        write_pages(k_cache, block_table, k, position)
        write_pages(v_cache, block_table, v, position)
        return
    where = torch.arange(k.shape[0], device=k.device) if entries is None else entries
    k_cache[where[:, None], position] = k
    v_cache[where[:, None], position] = v
