"""``decode`` in Triton: few query rows over dense and paged caches. Semantics: ops/decode.py, reference/decode.py.

A program has up to 16 rows of one KV head's queries and a split of its keys; a second kernel puts splits together in
order. Where splits lie depends on nothing but the keys of the sequence (or its list) themselves.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import capped, load_rows, padded, strides_of
from .common import kernel_dtype, readable

_ROWS = 16
_SPLIT = tl.constexpr(256)  # keys, and more where there would be more splits than these
_SPLITS = tl.constexpr(64)


def decode(
    q: Tensor, k: Tensor, v: Tensor, seq_lens: Tensor | None, block_table: Tensor | None, scale: float, softcap: float,
    key_bias: Tensor | None, tokens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``torch.ops.fastok.decode``."""
    batch, rows, heads, dim = q.shape
    page, groups, width = *k.shape[1:3], v.shape[3]
    total = page if block_table is None else block_table.shape[1] * page
    lse = q.new_empty(batch, heads, rows, dtype=torch.float32)
    out = torch.empty(batch, rows, heads, width, dtype=kernel_dtype(q.dtype), device=q.device)
    if lse.numel() == 0:
        return out.to(q.dtype), lse
    given, q, k, v = q.dtype, readable(q), readable(k), readable(v)
    listed = None if tokens is None else _ordered(tokens, total)
    capacity = total if listed is None else listed.shape[2]
    units = groups if listed is None else listed.shape[1]  # heads with keys of their own
    pack = heads // max(units, groups)
    splits = min(max(triton.cdiv(capacity, _SPLIT.value), 1), _SPLITS.value)
    tiles = triton.cdiv(rows * pack, _ROWS)
    parts, part_lse = (torch.empty(splits, *shape, dtype=torch.float32, device=q.device)
                       for shape in ((*lse.shape, width), lse.shape))  # fmt: skip
    bias = None if key_bias is None else key_bias.contiguous()
    lengths = None if seq_lens is None else seq_lens.contiguous()
    table = None if block_table is None else block_table.contiguous()
    widest = max(padded(dim), padded(width)) * q.element_size()
    _decode_split[(batch * (heads // pack) * tiles, splits)](
        q, k, v, lengths, table, bias, listed, parts, part_lse,
        *strides_of(q), *strides_of(k), *strides_of(v), 0 if bias is None else bias.stride(0),
        bias.stride(1) if bias is not None and bias.dim() == 3 else 0,
        0 if lengths is None else lengths.dim() - 1, 0 if table is None else table.shape[1],
        units, capacity, heads, groups, pack, rows, tiles, total, page, k.shape[0],
        scale / softcap if softcap > 0 else scale, softcap if softcap > 0 else None,
        D=dim, D_BLOCK=padded(dim), WIDTH=width, WIDTH_BLOCK=padded(width), M=_ROWS, N=32 if widest <= 512 else 16,
        num_warps=4, num_stages=2 if q.element_size() == 2 else 1,
    )  # fmt: skip
    combine(parts, part_lse, out, lse)
    return out.to(given), lse


def combine(parts: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """``out[B,S,H,D]`` and ``lse[B,H,S]`` of at most 64 ``parts[n,B,H,S,D]``, in order."""
    splits, _, heads, rows, width = parts.shape
    _combine[(lse.numel(),)](
        parts, part_lse, out, lse, splits, lse.numel(), rows, heads, WIDTH=width, WIDTH_BLOCK=padded(width),
    )  # fmt: skip


def _ordered(tokens: Tensor, total: int) -> Tensor:
    """int32 lists in ascending order, -1 for what is no place or is there already."""
    place = torch.where((tokens < 0) | (tokens >= total), total, tokens).sort(-1).values
    again = torch.nn.functional.pad(place[..., 1:] == place[..., :-1], (1, 0))
    return torch.where(again | (place == total), -1, place).int().contiguous()


@triton.jit(
    do_not_specialize=["units", "list_size", "heads", "groups", "pack", "rows", "tiles", "total", "page", "pages"]
)
def _decode_split(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    lengths: tl.tensor,
    table: tl.tensor,
    bias: tl.tensor,
    listed: tl.tensor,
    parts: tl.tensor,
    part_lse: tl.tensor,
    q_batch: tl.int64,
    q_row: tl.int64,
    q_head: tl.int64,
    k_batch: tl.int64,
    k_row: tl.int64,
    k_head: tl.int64,
    v_batch: tl.int64,
    v_row: tl.int64,
    v_head: tl.int64,
    bias_batch: tl.int64,
    bias_head: tl.int64,
    by_head: tl.int64,
    table_batch: tl.int64,
    units: int,
    list_size: int,
    heads: int,
    groups: int,
    pack: int,
    rows: int,
    tiles: int,
    total: int,
    page: int,
    pages: int,
    factor: float,
    cap: float | None,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
) -> None:
    """Programs are (sample, heads that share keys, tile of rows) and splits. Row i is query i // pack."""
    program = tl.program_id(0)
    split = tl.program_id(1)
    item = program % tiles * M + tl.arange(0, M)
    first_head = program // tiles % (heads // pack) * pack
    sample = (program // tiles // (heads // pack)).to(tl.int64)
    group = first_head // (heads // groups)
    inside = item < rows * pack
    query = item // pack
    head = first_head + item % pack

    length = total
    if lengths is not None:
        at = sample * groups + group if by_head else sample
        length = tl.minimum(tl.maximum(tl.load(lengths + at), 0), total).to(tl.int32)
    last = length - rows + query
    own_bias = None
    if bias is not None:
        own_bias = bias + sample * bias_batch + head * bias_head
    count = length
    if listed is not None:
        count = list_size
        listed += (sample * units + first_head // (heads // units)) * list_size
    each = (count + _SPLITS - 1) // _SPLITS
    each = tl.maximum((each + _SPLIT // 2 - 1) // (_SPLIT // 2) * (_SPLIT // 2), _SPLIT)
    begin = split * each
    end = tl.minimum(begin + each, count)

    q_tile = load_rows(q + sample * q_batch, query * q_row + head * q_head, 1, inside, D, D_BLOCK)
    peak = tl.full([M], float("-inf"), tl.float32)
    norm = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, WIDTH_BLOCK], tl.float32)
    for start in range(begin, end, N):
        at = start + tl.arange(0, N)
        key = at
        there = at < end
        if listed is not None:
            key = tl.load(listed + at, mask=there, other=-1)
            there = there & (key >= 0) & (key < length)
            key = tl.maximum(key, 0)
        block = tl.zeros([N], tl.int64) + sample
        token = key
        if table is not None:
            # Tables come from the user: whatever they hold, no index leaves the arrays.
            block = tl.load(table + sample * table_batch + key // page, mask=there, other=0).to(tl.int64)
            token = key % page
            there = there & (block >= 0) & (block < pages)
        k_tile = load_rows(k + group * k_head, block * k_batch + token * k_row, 1, there, D, D_BLOCK)
        v_tile = load_rows(v + group * v_head, block * v_batch + token * v_row, 1, there, WIDTH, WIDTH_BLOCK)
        peak, norm, acc = attend(
            q_tile, k_tile, v_tile, there, key, last, own_bias, total, inside, peak, norm, acc, factor, cap, M, N,
        )  # fmt: skip
    row = (sample * heads + head) * rows + query
    store_part(parts, part_lse, split, tl.num_programs(0) // tiles // (heads // pack) * heads * rows, row, inside, peak,
               norm, acc, WIDTH, WIDTH_BLOCK)  # fmt: skip


@triton.jit
def attend(
    q_tile: tl.tensor,
    k_tile: tl.tensor,
    v_tile: tl.tensor,
    there: tl.tensor,
    place: tl.tensor,
    last: tl.tensor,
    bias: tl.tensor,
    places: tl.tensor,
    inside: tl.tensor,
    peak: tl.tensor,
    norm: tl.tensor,
    acc: tl.tensor,
    factor: float,
    cap: float | None,
    M: tl.constexpr,
    N: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The running softmax after some more keys, of which row i sees those up to ``last[i]``; ``bias`` is each row's."""
    products = tl.dot(q_tile, tl.trans(k_tile), tl.zeros([M, N], tl.float32), input_precision="ieee")
    logits = capped(products, factor, cap)
    if bias is not None:
        own = bias[:, None] + tl.minimum(place, places - 1)[None, :]
        logits += tl.load(own, mask=inside[:, None] & there[None, :], other=0)
    logits = tl.where(there[None, :] & (place[None, :] <= last[:, None]), logits, float("-inf"))
    top = tl.maximum(peak, tl.max(logits, 1))
    base = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp(logits - base[:, None])
    fading = tl.exp(peak - base)
    norm = norm * fading + tl.sum(weight, 1)
    acc = tl.dot(weight.to(v_tile.dtype), v_tile, acc * fading[:, None], input_precision="ieee")
    return top, norm, acc


@triton.jit
def store_part(
    parts: tl.tensor,
    part_lse: tl.tensor,
    split: tl.tensor,
    split_rows: tl.tensor,
    row: tl.tensor,
    inside: tl.tensor,
    peak: tl.tensor,
    norm: tl.tensor,
    acc: tl.tensor,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
) -> None:
    """What a split's rows came to, for :func:`combine`; ``row`` counts in ``[B,H,S]``."""
    norm = tl.where(norm == 0, 1.0, norm)
    result = split.to(tl.int64) * split_rows + row
    tl.store(part_lse + result, tl.where(peak == float("inf"), peak, peak + tl.log(norm)), mask=inside)
    d = tl.arange(0, WIDTH_BLOCK)[None, :]
    tl.store(parts + result[:, None] * WIDTH + d, acc / norm[:, None], mask=inside[:, None] & (d < WIDTH))


@triton.jit(do_not_specialize=["splits", "n", "rows", "heads"])
def _combine(
    parts: tl.tensor,
    part_lse: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    splits: int,
    n: int,
    rows: int,
    heads: int,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
) -> None:
    """A program per row ``[B,H,S]``; out is ``[B,S,H,WIDTH]``."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, WIDTH_BLOCK)
    split = tl.arange(0, _SPLITS)
    peak = tl.max(tl.load(part_lse + split * n + row, mask=split < splits, other=float("-inf")), 0)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    norm = tl.zeros([1], tl.float32)
    acc = tl.zeros([WIDTH_BLOCK], tl.float32)
    for s in range(0, splits):
        weight = tl.exp(tl.load(part_lse + s * n + row) - base)
        norm += weight
        acc += weight * tl.load(parts + (s * n + row) * WIDTH + d, mask=d < WIDTH, other=0)
    norm = tl.where(norm == 0, 1.0, norm)
    one = tl.zeros([1], tl.int64) + row
    tl.store(lse + one, tl.where(peak == float("inf"), peak, peak + tl.log(norm)))
    to = (row // rows // heads * rows + row % rows) * heads + row // rows % heads
    tl.store(out + to * WIDTH + d, (acc / norm).to(out.dtype.element_ty), mask=d < WIDTH)
