"""Attention over paged caches: decode kernels where they serve the call, chunks of gathered keys where they do not."""

from itertools import pairwise

import torch
from torch import Tensor

from .attention import attention
from .checks import check_dtype, check_range, check_same_device, check_shape, has_values
from .decode import MOST_ROWS, PagedKV, attention_decode

CHUNK = 4096  # keys of each sequence that are copied out of their pages at a time


def check_pages(
    names: tuple[str, str], q: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, batch: int
) -> None:
    """Pages ``[pages,P,G,D]``, under the ``names`` that their caller knows them by, and the table of them."""
    for name, pages in zip(names, (k_pages, v_pages), strict=True):
        check_dtype(name, pages, (q.dtype,))
        check_shape(name, pages, (None, None, None, q.shape[-1]), "[pages,P,G,D] with block_table, D that of q")
        check_same_device(name, pages, "q", q.device)
    check_shape(names[1], v_pages, tuple(k_pages.shape), f"that of {names[0]}")
    if 0 in k_pages.shape[1:3]:
        raise ValueError(f"{names[0]} must have pages of at least one token and one head, got {list(k_pages.shape)}")
    check_dtype("block_table", block_table, (torch.int32, torch.int64))
    check_shape("block_table", block_table, (batch, None), "[B,n]")
    check_same_device("block_table", block_table, "q", q.device)


def check_used_pages(block_table: Tensor, pages: int, size: int, lengths: Tensor) -> None:
    """ValueError unless the entries that hold ``lengths[B]`` tokens are pages. Only the CPU looks at them."""
    if block_table.device.type != "cpu" or not has_values(block_table):
        return
    used = torch.arange(block_table.shape[1]) * size < lengths[:, None]
    check_range("block_table", block_table[used], 0, pages)


def write_pages(pages: Tensor, block_table: Tensor, new: Tensor, positions: Tensor) -> None:
    """Puts ``new[B,S,G,D]`` at ``positions[B,S]`` of its sequences, in place."""
    size = pages.shape[1]
    pages[block_table.long().gather(1, (positions // size).long()), positions % size] = new


def attention_between(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, cu_seqlens_q: Tensor, most_rows: int, scale: float,
    left: int, right: int, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Packed queries ``[total,H,D]`` over tokens ``first[B]`` to ``last[B]`` of ``k, v [B,T,G,D]``, uncopied."""
    batch, capacity = k.shape[:2]
    # What lies before and behind each sequence's tokens is made into sequences without queries.
    starts = torch.arange(batch + 1, device=q.device) * capacity
    begins = starts[:-1]
    bounds = torch.stack([begins, begins + first, begins + torch.maximum(first, last)], 1).flatten()
    queries = torch.stack([cu_seqlens_q[:-1], cu_seqlens_q[:-1], cu_seqlens_q[1:]], 1).flatten()
    return attention(
        q, k.flatten(0, 1), v.flatten(0, 1), scale=scale, window=(left, right), softcap=softcap,
        cu_seqlens_q=torch.cat([queries, cu_seqlens_q[-1:]]).int(),
        cu_seqlens_k=torch.cat([bounds, starts[-1:]]).int(),
        max_seqlen_q=most_rows, max_seqlen_k=capacity,
    )  # fmt: skip


@torch.no_grad()
def attention_paged(
    q: Tensor, cache: PagedKV, cu_seqlens_q: Tensor, most_rows: int, scale: float, left: int, right: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Packed queries ``q[total,H,D]``, the newest tokens of sequences in pages: ``out`` like ``q``, ``lse[H,total]``.

    Arguments are checked already; ``left`` and ``right`` are bounds of a window as in :func:`attention`. Where every
    sequence has the same number of queries, up to 16, and no window cuts through them, decode kernels read the pages in
    place, those outside a window not at all. Otherwise chunks of 4,096 keys are copied out, counted from each
    sequence's end so that all have the same mask, and merged by log-sum-exp. No host synchronisation on CUDA.
    """
    lengths, table = cache.seq_lens, cache.block_table
    batch, total = table.shape[0], q.shape[0]
    page = cache.k_pages.shape[1]
    capacity = table.shape[1] * page
    left = -1 if left >= capacity else left
    right = -1 if right >= most_rows - 1 else right
    even = total == batch * most_rows
    if even and most_rows == 1:
        recent, bias = (cache, None) if left < 0 else _recent_pages(cache, left)
        out, lse = attention_decode(q[:, None], recent, key_bias=bias, scale=scale, softcap=softcap)
        return out[:, 0], lse[:, :, 0].T.contiguous()
    if even and 0 < most_rows <= MOST_ROWS and left < 0 and right in (-1, 0):
        groups = cache.k_pages.shape[2]
        rows = q.unflatten(0, (batch, most_rows))
        if right == 0:
            out, lse = attention_decode(rows, cache, scale=scale, softcap=softcap)
            return out.flatten(0, 1), lse.transpose(0, 1).flatten(1)
        # Rows that all see every key are so many more heads of one row.
        heads = rows.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)
        out, lse = attention_decode(heads.flatten(1, 3)[:, None], cache, scale=scale, softcap=softcap)
        out = out[:, 0].unflatten(1, heads.shape[1:4]).permute(0, 3, 1, 2, 4)
        return out.flatten(2, 3).flatten(0, 1), lse.view(batch, q.shape[1], most_rows).transpose(0, 1).flatten(1)
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere, looking would be a wait
        capacity = min(capacity, int(lengths.max())) if batch else 0
    return _over_chunks(q, cache, cu_seqlens_q, most_rows, scale, left, right, softcap, capacity)


def _recent_pages(cache: PagedKV, left: int) -> tuple[PagedKV, Tensor]:
    """The pages that hold each sequence's last ``left + 1`` tokens, and a bias that hides what is before those."""
    page, columns = cache.k_pages.shape[1], cache.block_table.shape[1]
    count = min((left + page - 1) // page + 1, columns)
    oldest = (cache.seq_lens.long() - 1 - left).clamp(min=0)[:, None]
    first = oldest // page
    table = cache.block_table.gather(1, (first + torch.arange(count, device=first.device)).clamp(max=columns - 1))
    place = first * page + torch.arange(count * page, device=first.device)
    bias = torch.zeros(place.shape, device=first.device).masked_fill(place < oldest, -torch.inf)
    return PagedKV(cache.k_pages, cache.v_pages, table, cache.seq_lens - (first[:, 0] * page)), bias


def _over_chunks(
    q: Tensor, cache: PagedKV, cu_seqlens_q: Tensor, most_rows: int, scale: float, left: int, right: int,
    softcap: float, capacity: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Chunks of keys by their distance from the end; the one in which a window ends for the first row is the last."""
    lengths = cache.seq_lens.long()
    needed = capacity if left < 0 else min(capacity, left + most_rows)
    starts = list(range(0, needed if left < 0 else min(needed, left + 1), CHUNK))
    out = torch.zeros(q.shape[:-1] + cache.v_pages.shape[-1:], dtype=torch.float32, device=q.device)
    lse = out.new_full((q.shape[1], q.shape[0]), -torch.inf)
    for begin, end in pairwise([*starts, needed]):
        count = end - begin
        last = (lengths - begin).clamp(min=0)
        place = last[:, None] - count + torch.arange(count, device=q.device)
        k, v = (_gathered(pages, cache.block_table, place) for pages in (cache.k_pages, cache.v_pages))
        part, part_lse = attention_between(
            q, k, v, (count - last).clamp(min=0), torch.full_like(last, count), cu_seqlens_q, most_rows, scale,
            left if left < 0 else left - begin, right if right < 0 else right + begin, softcap,
        )  # fmt: skip
        out, lse = torch.ops.fastok.merge_states(out, lse, part, part_lse)
    return out.to(q.dtype), lse


def _gathered(pages: Tensor, block_table: Tensor, place: Tensor) -> Tensor:
    """``[B,n,G,D]``: the tokens at ``place[B,n]``; anything where that is negative."""
    inside, size = place.clamp(min=0), pages.shape[1]
    block = block_table.long().gather(1, inside // size)
    return pages[torch.where(place < 0, 0, block), inside % size]
