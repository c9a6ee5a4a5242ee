"""FlashAttention 2's entry points over fastok's attention: change ``from flash_attn import …`` into ``fastok.flash``.

Names, argument order, defaults and results are those of flash-attn 2.8, and more is served: any device, fp32, gradients
that are always deterministic. One result differs: ``softmax_lse`` is -inf, not +inf, for a row that sees no key, so
that partial results merge (:func:`fastok.merge_states`). Not served, and refused by name: dropout, ALiBi, paged caches.
Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", ICLR 2024.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops.attention import attention
from .ops.checks import ACTIVATIONS, check_dtype, check_int, check_range, check_shape

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
    scale = _scale(q, softmax_scale)
    out, lse = attention(
        padded(q), padded(k), padded(v), scale=scale, causal=causal, window=_window(window_size), softcap=softcap
    )
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
        block_table: None.

        The others are as for :func:`flash_attn_func`.

    Returns:
        ``out[total_q,H,D]``; with ``return_attn_probs`` also ``softmax_lse`` fp32 ``[H,total_q]`` and an empty S_dmask.

    Raises:
        NotImplementedError: dropout, ALiBi or pages. TypeError, ValueError: as :func:`fastok.attention`.
    """
    _refuse(dropout_p=dropout_p, alibi_slopes=alibi_slopes, block_table=block_table)
    scale = _scale(q, softmax_scale)
    out, lse = attention(
        padded(q), padded(k), padded(v), scale=scale, causal=causal, window=_window(window_size), softcap=softcap,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
    )  # fmt: skip
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
        k_cache, v_cache: ``[B_cache,T,G,D]``; changed in place if ``k`` and ``v`` are given.
        k, v: ``[B,S_new,G,D]``, written behind the ``cache_seqlens`` tokens that each sequence has.
        rotary_cos, rotary_sin: ``[positions, rotary_dim / 2]``. The first rotary_dim channels of the new keys are
            rotated to the positions they get, those of the queries to the positions from ``cache_seqlens`` on (with
            neither ``causal`` nor a window: all to ``cache_seqlens``). Only with ``k`` and ``v``.
        cache_seqlens: how many tokens are in the cache, an int or int32 ``[B]``; None: it is full.
        cache_batch_idx: int32 ``[B]``, which cache entry belongs to each sequence; attention to them costs a copy.
        cache_leftpad: int32 ``[B]``, so many tokens at the beginning of each sequence's cache do not count.
        block_table: None.
        rotary_interleaved: rotate neighbouring channels rather than the two halves.
        num_splits: accepted; how keys are shared out is decided by shapes.
        return_softmax_lse: return the fp32 ``[B,H,S]`` log-sum-exp too.

        The others are as for :func:`flash_attn_func`; masks are aligned to each sequence's last token.

    Returns:
        ``out[B,S,H,D]``, or ``(out, softmax_lse)``. Not differentiable, no host synchronisation.

    Raises:
        NotImplementedError: ALiBi, pages, or rotary embedding with ``cache_leftpad``.
        TypeError, ValueError: arguments that do not fit each other or the cache.
    """
    _refuse(alibi_slopes=alibi_slopes, block_table=block_table)
    _check_cache(q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad)
    batch, rows = q.shape[:2]
    capacity = k_cache.shape[1]
    window = _window(window_size)
    entries = cache_batch_idx
    if entries is None and k_cache.shape[0] != batch:
        entries = torch.arange(batch, device=q.device)
    lengths: int | Tensor = capacity if cache_seqlens is None else cache_seqlens
    if k is not None and v is not None:
        if rotary_cos is not None and rotary_sin is not None:
            steps = torch.arange(rows, device=q.device) * (causal or window is not None)
            q = _rotated(q, rotary_cos, rotary_sin, _positions(lengths, steps), rotary_interleaved)
            steps = torch.arange(k.shape[1], device=q.device)
            k = _rotated(k, rotary_cos, rotary_sin, _positions(lengths, steps), rotary_interleaved)
        _write(k_cache, v_cache, k, v, lengths, entries)
        lengths = lengths + k.shape[1]
    if entries is not None:
        k_cache, v_cache = k_cache[entries], v_cache[entries]
    scale = _scale(q, softmax_scale)
    if isinstance(lengths, int) and cache_leftpad is None:
        out, lse = attention(
            q, k_cache[:, :lengths], v_cache[:, :lengths], scale=scale, causal=causal, window=window, softcap=softcap
        )
    else:
        # The whole cache as one packed tensor, uncopied: what lies before and behind each sequence's tokens is made
        # into sequences without queries.
        first = torch.zeros(batch, dtype=torch.int32, device=q.device) if cache_leftpad is None else cache_leftpad
        last = torch.full_like(first, lengths) if isinstance(lengths, int) else lengths
        starts = torch.arange(batch, device=q.device) * capacity
        bounds = torch.stack([starts, starts + first, starts + last], 1).flatten()
        queries = torch.arange(batch, device=q.device)[:, None] * rows + torch.tensor([0, 0, rows], device=q.device)
        out, lse = attention(
            q.reshape(-1, *q.shape[2:]), k_cache.flatten(0, 1), v_cache.flatten(0, 1), scale=scale, causal=causal,
            window=window, softcap=softcap, cu_seqlens_q=_cumulative(queries.flatten(), batch * rows),
            cu_seqlens_k=_cumulative(bounds, batch * capacity), max_seqlen_q=rows, max_seqlen_k=capacity,
        )  # fmt: skip
        out = out.unflatten(0, (batch, rows))
        lse = lse.unflatten(1, (batch, rows)).transpose(0, 1).contiguous()
    return (out, lse) if return_softmax_lse else out


# ---- arguments -------------------------------------------------------------------------------------------------------


def _refuse(dropout_p: float = 0.0, alibi_slopes: Tensor | None = None, block_table: Tensor | None = None) -> None:
    for name, given, required, supported in (
        ("dropout_p", dropout_p != 0, f"dropout_p={dropout_p}", "0.0"),
        ("alibi_slopes", alibi_slopes is not None, "ALiBi", "None"),
        ("block_table", block_table is not None, "a paged cache", "None, a contiguous cache"),
    ):
        if given:
            raise NotImplementedError(f"{name}: required, {required}; supported, {supported}; missing, {required}")


def _scale(q: Tensor, softmax_scale: float | None) -> float | None:
    """Of the unpadded head dim."""
    check_dtype("q", q, ACTIVATIONS)
    return q.shape[-1] ** -0.5 if softmax_scale is None and q.shape[-1] else softmax_scale


def padded(x: Tensor) -> Tensor:
    """With a head dim that is a multiple of 8, which zeros do not change the attention of."""
    return F.pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else x


def _window(window_size: tuple[int, int]) -> tuple[int, int] | None:
    left, right = window_size
    # Any negative bound is unbounded there.
    return None if left < 0 and right < 0 else (max(left, -1), max(right, -1))


# ---- caches ----------------------------------------------------------------------------------------------------------


def _check_cache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None, rotary_cos: Tensor | None,
    rotary_sin: Tensor | None, cache_seqlens: int | Tensor | None, cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
) -> None:  # fmt: skip
    check_shape("q", q, (None, None, None, None), "[B,S,H,D]")
    batch = q.shape[0]
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_dtype(name, cache, (q.dtype,))
        check_shape(name, cache, (None, None, None, None), "[B,T,G,D]")
    check_shape("v_cache", v_cache, (*k_cache.shape[:3], None), "[B,T,G,D] of k_cache")
    if k_cache.shape[0] < batch and cache_batch_idx is None:
        raise ValueError(f"k_cache must have an entry for each of {batch} sequences, got {k_cache.shape[0]}")
    for name, index in (("cache_seqlens", cache_seqlens), ("cache_batch_idx", cache_batch_idx),
                        ("cache_leftpad", cache_leftpad)):  # fmt: skip
        if isinstance(index, Tensor):
            check_dtype(name, index, INT32_OR_64)
            check_shape(name, index, (batch,), "[B] of q")
            if index.device.type == "cpu":  # elsewhere, looking at values would be a wait
                room = k_cache.shape[1] - (0 if k is None or name == "cache_leftpad" else k.shape[1])
                check_range(name, index, 0, k_cache.shape[0] if name == "cache_batch_idx" else room + 1)
    if (k is None) != (v is None):
        raise ValueError("k and v must be given together")
    if k is None and (rotary_cos is not None or rotary_sin is not None):
        raise ValueError("rotary_cos and rotary_sin need k and v: what is in the cache has been rotated already")
    if (rotary_cos is None) != (rotary_sin is None):
        raise ValueError("rotary_cos and rotary_sin must be given together")
    if rotary_cos is not None and rotary_sin is not None:
        if cache_leftpad is not None:
            raise NotImplementedError(
                "cache_leftpad: required, rotary embedding of padded sequences; supported, either; missing, both"
            )
        if rotary_cos.shape[-1] * 2 > q.shape[-1]:
            raise ValueError(
                f"rotary_cos must be [positions, at most {q.shape[-1] // 2}], got {list(rotary_cos.shape)}"
            )
        check_shape("rotary_sin", rotary_sin, tuple(rotary_cos.shape), "that of rotary_cos")
    if k is not None and v is not None:
        if cache_seqlens is None:
            raise ValueError("cache_seqlens must say where k and v are to be written")
        for name, new, cache in (("k", k, k_cache), ("v", v, v_cache)):
            check_dtype(name, new, (q.dtype,))
            check_shape(name, new, (batch, None, *cache.shape[2:]), f"[B,S_new,G,D] to go with {name}_cache")
        check_shape("v", v, (*k.shape[:3], None), "[B,S_new,G,D] of k")
    if cache_seqlens is not None and not isinstance(cache_seqlens, Tensor):
        check_int("cache_seqlens", cache_seqlens)
        needed = cache_seqlens + (0 if k is None else k.shape[1])
        if not 0 <= cache_seqlens <= needed <= k_cache.shape[1]:
            raise ValueError(f"cache_seqlens must fit the cache's {k_cache.shape[1]} tokens, got {needed} with k")


def _positions(lengths: int | Tensor, steps: Tensor) -> Tensor:
    """``[S]`` or ``[B,S]``: ``steps`` from each sequence's end on."""
    return lengths + steps if isinstance(lengths, int) else lengths[:, None] + steps


def _write(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: int | Tensor, entries: Tensor | None
) -> None:
    """Puts new tokens behind those of each sequence, in place."""
    if isinstance(lengths, int) and entries is None:
        k_cache[:, lengths : lengths + k.shape[1]] = k
        v_cache[:, lengths : lengths + k.shape[1]] = v
        return
    where = torch.arange(k.shape[0], device=k.device) if entries is None else entries
    position = _positions(lengths, torch.arange(k.shape[1], device=k.device))
    k_cache[where[:, None], position] = k
    v_cache[where[:, None], position] = v


def _cumulative(starts: Tensor, end: int) -> Tensor:
    return F.pad(starts, (0, 1), value=end).to(torch.int32)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """``x[B,S,H,D]`` with its first 2 * cos.shape[1] channels rotated, computed in fp32."""
    cos, sin = (table[positions].float().unsqueeze(-2) for table in (cos, sin))
    half = cos.shape[-1]
    turning, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
    a, b = (turning[..., 0::2], turning[..., 1::2]) if interleaved else (turning[..., :half], turning[..., half:])
    a, b = a * cos - b * sin, a * sin + b * cos
    turned = torch.stack([a, b], -1).flatten(-2) if interleaved else torch.cat([a, b], -1)
    return torch.cat([turned.to(x.dtype), rest], -1)
