"""``attention_scores`` in Triton. Semantics: ops/attention.py, reference/attention.py.

One program holds a tile of keys and walks over the selected rows, with the log-sum-exp of each row at hand: every
column is reduced in one place, without atomics. Sums of sums and maxima of maxima are taken for every query head and
then over the heads; where heads and rows are reduced differently, a program walks over the rows and the heads of its
group.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import (
    END,
    LOG2E,
    Tile,
    capped,
    chunked_products,
    extent,
    find_sequence,
    load_rows,
    masking_of,
    padded,
    row_pass,
    sees,
    slice_of,
    strides_of,
)
from .common import readable

_FOLD_BLOCK = 512  # columns per program of `_fold`


def score_tile(dim: int, dtype: torch.dtype, n_rows: int, fold: bool) -> Tile:
    """For the key-stationary kernel; the remarks on :func:`fastok.triton.attention.forward_tile` hold here.

    ``fold``: the heads of a group take turns, so keys are loaded again at every step and need buffers too.
    """
    wide = padded(dim) > 128
    rows = 16 if n_rows <= 16 else 32 if wide else 64
    if dtype == torch.float32:
        return Tile(min(rows, 32), 64, min(padded(dim), 32), 8, 1)
    return Tile(rows, 64 if wide or fold else 128, padded(dim), 4 if wide else 8, 2)


def attention_scores(
    q: Tensor, k: Tensor, lse: Tensor | None, key_weight: Tensor | None, scale: float, left: int, right: int,
    softcap: float, key_bias: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    max_seqlen_q: int, max_seqlen_k: int, rows: Tensor | None, row_begin: int, row_end: int, col_begin: int,
    col_end: int, over_cols: bool, reduce: str, head_group: int, head_max: bool, logits: bool,
) -> Tensor:  # fmt: skip
    """``torch.ops.fastok.attention_scores``: column statistics, fp32 ``[B, H/head_group, T']``."""
    packed = cu_seqlens_q is not None
    masking = masking_of(q, k, scale, left, right, softcap, key_bias, cu_seqlens_q, cu_seqlens_k)
    total_q, heads, dim = q.shape[-3:]
    total_k = k.shape[-3]
    col_begin, col_end, _ = slice(col_begin, col_end).indices(total_k)
    n_cols = max(col_end - col_begin, 0)
    if not packed:
        row_begin, row_end, _ = slice(row_begin, row_end).indices(total_q)
    row_begin, row_end = (max(-END, min(bound, END)) for bound in (row_begin, row_end))
    n_rows = rows.shape[0] if rows is not None else _most_rows(row_begin, row_end)
    rows = None if rows is None else rows.contiguous()

    # Reduced over heads at once, or afterwards?
    fold = head_group > 1 and (reduce == "none" or head_max != (reduce == "max"))
    n_heads = heads // head_group if fold else heads
    lead = () if packed else (q.shape[0],)
    out = q.new_empty(*lead, n_heads, *((n_rows,) if reduce == "none" else ()), n_cols, dtype=torch.float32)
    if out.numel() > 0:
        q, k = readable(q), readable(k)
        if logits:
            lse = None
        elif lse is None or over_cols:
            cols = (col_begin, col_end) if over_cols else (0, END)
            known = None if n_rows == END else n_rows
            lse = row_pass(q, k, None, None, masking, rows, (row_begin, row_end), known, cols)
        else:
            lse = lse.contiguous()
        tile = score_tile(dim, q.dtype, n_rows, fold)
        samples, tiles = (1 if packed else q.shape[0]), triton.cdiv(n_cols, tile.keys)
        if packed:
            tiles = total_k // tile.keys + masking.sequences + 1
        _key_pass[(samples * n_heads * tiles,)](
            q, k, lse, masking.bias, None if key_weight is None else key_weight.contiguous(),
            masking.cu_q, masking.cu_k, rows, out,
            *strides_of(q), *strides_of(k), *masking.bias_strides,
            n_heads, head_group if fold else 1, heads // k.shape[-2], masking.sequences, total_q, total_k, tiles,
            n_rows, row_begin, row_end, col_begin, col_end,
            *masking.factor_and_cap, masking.left, masking.right,
            REDUCE=reduce, HEAD_MAX=head_max, FOLD=fold, D=dim, D_BLOCK=padded(dim), CHUNK=tile.chunk,
            M=tile.rows, N=tile.keys, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    if fold or head_group == 1:
        return out
    folded = out.new_empty(*lead, heads // head_group, n_cols)
    if folded.numel() > 0:
        grid = (folded.numel() // n_cols, triton.cdiv(n_cols, _FOLD_BLOCK))
        _fold[grid](out, folded, n_cols, head_group, MAX=head_max, BLOCK=_FOLD_BLOCK)
    return folded


def _most_rows(begin: int, end: int) -> int:
    """The most rows that ``[begin:end]`` takes of any sequence; END if there is no knowing."""
    if (begin < 0) == (end < 0):
        return max(end - begin, 0)
    return -begin if begin < 0 else END


@triton.jit
def _larger(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(
    do_not_specialize=[
        "n_heads", "head_group", "group", "sequences", "total_q", "total_k", "tiles", "n_rows", "row_begin", "row_end",
        "col_begin", "col_end", "left", "right",
    ]
)  # fmt: skip
def _key_pass(
    q: tl.tensor,
    k: tl.tensor,
    lse: tl.tensor,
    bias: tl.tensor,
    key_weight: tl.tensor,
    cu_q: tl.tensor,
    cu_k: tl.tensor,
    rows: tl.tensor,
    out: tl.tensor,
    q_batch: tl.int64,
    q_row: tl.int64,
    q_head: tl.int64,
    k_batch: tl.int64,
    k_row: tl.int64,
    k_head: tl.int64,
    bias_batch: tl.int64,
    bias_head: tl.int64,
    n_heads: int,
    head_group: int,
    group: int,
    sequences: int,
    total_q: int,
    total_k: int,
    tiles: int,
    n_rows: int,
    row_begin: int,
    row_end: int,
    col_begin: int,
    col_end: int,
    factor: float,
    cap: float | None,
    left: int | None,
    right: int | None,
    REDUCE: tl.constexpr,
    HEAD_MAX: tl.constexpr,
    FOLD: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
) -> None:
    """Programs are (sample, head of the result, tile of keys). ``lse`` None: logits instead of probabilities.

    ``n_heads``: heads of the result. ``head_group``: query heads that are reduced to one of them here. ``group``: query
    heads of one KV head.
    """
    program = tl.program_id(0)
    place = program % tiles
    out_head = program // tiles % n_heads
    number = program // tiles // n_heads
    if cu_k is not None:
        number, place = find_sequence(cu_k, sequences, place, N)
    q_start, n_q = extent(cu_q, number, sequences, total_q, False)
    k_start, n_k = extent(cu_k, number, sequences, total_k, True)
    sample = (number if cu_k is None else number * 0).to(tl.int64)
    heads = n_heads * head_group
    q += sample * q_batch + q_start * q_row
    k += sample * k_batch + k_start * k_row
    if lse is not None:
        lse += sample * heads * total_q + q_start
    if bias is not None:
        bias += sample * bias_batch + k_start
    if key_weight is not None:
        key_weight += sample * (heads // group) * total_k + k_start

    # Keys of this tile, counted from their sequence's first, and whether they are exported.
    col_first = tl.maximum(col_begin - k_start, 0)
    limit = tl.minimum(col_end - k_start, n_k)
    key_first = place * N
    if cu_k is None:
        key_first += col_begin
    key = key_first + tl.arange(0, N)
    exported = (key >= col_first) & (key < limit)

    # Selected rows, and from which to which of them can see any of these keys. Packed sequences of keys may come
    # without queries.
    shift = n_k - n_q
    if rows is None:
        first_row, count = slice_of(row_begin, row_end, n_q)
        from_item = 0
        to_item = count
        if right is not None:
            from_item = tl.maximum(key_first - right - shift - first_row, 0) // M * M
        if left is not None:
            to_item = tl.minimum(count, tl.minimum(key_first + N, limit) + left - shift - first_row)
    else:
        from_item = 0
        to_item = tl.where(n_q > 0, n_rows, 0)
    if REDUCE == "none":
        from_item = 0
        to_item = n_rows

    head = out_head * head_group
    if not FOLD:
        if CHUNK == D_BLOCK:
            k_tile = load_rows(k + head // group * k_head, key, k_row, exported, D, D_BLOCK)
        if bias is not None:
            key_bias = tl.load(bias + head * bias_head + key, mask=exported, other=0)
        if key_weight is not None:
            weight = tl.load(key_weight + (head // group).to(tl.int64) * total_k + key, mask=exported, other=0)

    worst = float("-inf") if lse is None else 0.0
    acc = tl.full([N, M], worst if REDUCE == "max" else 0.0, tl.float32)
    over_heads = acc
    for step in range(0, tl.cdiv(tl.maximum(to_item - from_item, 0), M) * head_group):
        item = from_item + step // head_group * M + tl.arange(0, M)
        if FOLD:
            head = out_head * head_group + step % head_group
            if CHUNK == D_BLOCK:
                k_tile = load_rows(k + head // group * k_head, key, k_row, exported, D, D_BLOCK)
            if bias is not None:
                key_bias = tl.load(bias + head * bias_head + key, mask=exported, other=0)
            if key_weight is not None:
                weight = tl.load(key_weight + (head // group).to(tl.int64) * total_k + key, mask=exported, other=0)
        if rows is None:
            row = first_row + item
            inside = item < count
        else:
            row = tl.load(rows + item, mask=item < n_rows, other=-1).to(tl.int32)
            inside = (row >= 0) & (row < n_q)

        if CHUNK == D_BLOCK:
            q_tile = load_rows(q + head * q_head, row, q_row, inside, D, D_BLOCK)
            products = tl.dot(k_tile, tl.trans(q_tile), tl.zeros([N, M], tl.float32), input_precision="ieee")
        else:
            products = chunked_products(
                k + head // group * k_head, key, k_row, exported, q + head * q_head, row, q_row, inside, N, M, D, CHUNK
            )
        value = capped(products, factor, cap)
        if bias is not None:
            value += key_bias[:, None]
        seen = sees((row + shift)[None, :], key[:, None], left, right) & inside[None, :]
        if lse is None:
            value = tl.where(seen, value, float("-inf"))
            if key_weight is not None:
                value = tl.where(value == float("-inf"), value, value * weight[:, None])
        else:
            # exp(x - inf) is 0: so rows that see nothing, and those that are not there, give nothing.
            finished = tl.load(lse + head.to(tl.int64) * total_q + row, mask=inside, other=float("inf"))
            finished = tl.where(finished == float("-inf"), float("inf"), finished)
            value = tl.exp2((value - finished[None, :]) * LOG2E)
            if (left is not None) or (right is not None) or (bias is not None):
                value = tl.where(seen, value, 0.0)
            if key_weight is not None:
                value = value * weight[:, None]

        if FOLD:
            fresh = step % head_group == 0
            done = step % head_group == head_group - 1
            if HEAD_MAX:
                value = _larger(tl.where(fresh, float("-inf"), over_heads), value)
            else:
                value += tl.where(fresh, 0.0, over_heads)
            over_heads = value
        if REDUCE == "none":
            at = out + ((sample * n_heads + out_head) * n_rows + item)[None, :] * (col_end - col_begin)
            at += (k_start - col_begin + key)[:, None]
            stored = n_rows
            if FOLD:
                stored = tl.where(done, n_rows, 0)
            tl.store(at, value, mask=exported[:, None] & (item < stored)[None, :])
        elif REDUCE == "max":
            if FOLD:
                value = tl.where(done, value, worst)
            acc = _larger(acc, value)
        else:
            if lse is None:
                value = tl.where(value == float("-inf"), 0.0, value)
            if FOLD:
                value = tl.where(done, value, 0.0)
            acc += value

    if REDUCE != "none":
        result = tl.sum(acc, 1)
        if REDUCE == "max":
            result = tl.where(tl.max((acc != acc).to(tl.int32), 1) > 0, float("nan"), tl.max(acc, 1))
        at = out + (sample * n_heads + out_head) * (col_end - col_begin) + k_start - col_begin + key
        tl.store(at, result, mask=exported)


@triton.jit(do_not_specialize=["n_cols", "head_group"])
def _fold(x: tl.tensor, out: tl.tensor, n_cols: int, head_group: int, MAX: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """Sum or maximum over the heads of each group, in order."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x += row * head_group * n_cols + column
    result = tl.load(x, mask=column < n_cols, other=0)
    for _ in range(1, head_group):
        x += n_cols
        value = tl.load(x, mask=column < n_cols, other=0)
        if MAX:
            result = _larger(result, value)
        else:
            result += value
    tl.store(out + row * n_cols + column, result, mask=column < n_cols)
