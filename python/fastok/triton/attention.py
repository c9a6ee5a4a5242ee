"""``attention`` in Triton, and the row pass of its scores. Semantics: ops/attention.py, reference/attention.py.

One program holds a tile of query rows and walks over the keys that they see, with a running softmax.
Packed sequences need no look at their lengths from the host: there are as many programs as tiles could be needed, and
each finds its sequence by bisection.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import kernel_dtype, readable

END = 2**31 - 1  # "to the end" where an int is needed
LOG2E = tl.constexpr(1 / math.log(2))
_LN2 = tl.constexpr(math.log(2))


class Tile(NamedTuple):
    """What one program of a kernel takes at once. ``chunk``: channels multiplied at once by a product of rows."""

    rows: int
    keys: int
    chunk: int
    warps: int
    stages: int


def padded(width: int) -> int:
    """Channels of a tile that holds rows of ``width`` whole: matrix instructions take powers of two, 16 and more."""
    return max(triton.next_power_of_2(width), 16)


def forward_tile(dim: int, width: int, dtype: torch.dtype, n_rows: int) -> Tile:
    """For the row-stationary kernel. Of one sample's shape only, so that its result does not depend on its batch.

    Within 99 KB of shared memory for every head dim, and without register spills beyond the few words that ptxas trades
    for occupancy (compiled for sm_80, sm_90 and sm_100). fp32 does not run on the tensor cores: twice the threads and
    thin products keep it within the registers.
    """
    widest = max(padded(dim), padded(width))
    rows = 16 if n_rows <= 16 else 64
    if dtype == torch.float32:
        return Tile(min(rows, 32 if widest > 64 else 64), 32, min(padded(dim), 32), 8, 1)
    keys = 64 if widest <= 64 else 32
    if widest <= 128 and n_rows > 64:
        return Tile(128, keys, padded(dim), 8, 2)
    return Tile(rows, keys, padded(dim), 8 if widest > 128 and rows > 16 else 4, 2)


@dataclass(frozen=True)
class Masking:
    """The arguments that all attention ops share, as the kernels take them."""

    scale: float
    left: int | None
    right: int | None
    softcap: float
    bias: Tensor | None
    bias_strides: tuple[int, int]  # of samples and heads
    cu_q: Tensor | None
    cu_k: Tensor | None

    @property
    def sequences(self) -> int:
        """How many packed sequences; 0 if there are none."""
        return 0 if self.cu_q is None else self.cu_q.shape[0] - 1

    @property
    def factor_and_cap(self) -> tuple[float, float | None]:
        """What :func:`capped` takes."""
        return (self.scale / self.softcap, self.softcap) if self.softcap > 0 else (self.scale, None)


def masking_of(
    q: Tensor, k: Tensor, scale: float, left: int, right: int, softcap: float, key_bias: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
) -> Masking:  # fmt: skip
    """From the flat arguments of the ops."""
    packed = cu_seqlens_q is not None
    # Farther than all tokens is as good as unbounded, and keeps positions within 32 bits.
    far = q.shape[-3] + k.shape[-3]
    strides = (0, 0)
    if key_bias is not None:
        key_bias = key_bias.contiguous()
        per_head = key_bias.dim() == (2 if packed else 3)
        strides = (0 if packed else key_bias.stride(0), key_bias.stride(-2) if per_head else 0)
    return Masking(
        scale, min(left, far) if left >= 0 else None, min(right, far) if right >= 0 else None, softcap, key_bias,
        strides, None if cu_seqlens_q is None else cu_seqlens_q.contiguous(),
        None if cu_seqlens_k is None else cu_seqlens_k.contiguous(),
    )  # fmt: skip


def strides_of(x: Tensor) -> tuple[int, int, int]:
    """Strides of samples, tokens and heads of ``[B,N,H,D]`` or packed ``[total,H,D]``."""
    return (0 if x.dim() == 3 else x.stride(0)), x.stride(-3), x.stride(-2)


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int, softcap: float, key_bias: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, max_seqlen_q: int, max_seqlen_k: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``torch.ops.fastok.attention``: ``out`` like ``q`` with the width of ``v``, and the log-sum-exp of each row."""
    masking = masking_of(q, k, scale, left, right, softcap, key_bias, cu_seqlens_q, cu_seqlens_k)
    out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=kernel_dtype(q.dtype), device=q.device)
    lse = row_pass(readable(q), readable(k), readable(v), out, masking)
    return out.to(q.dtype), lse


def row_pass(
    q: Tensor, k: Tensor, v: Tensor | None, out: Tensor | None, masking: Masking, rows: Tensor | None = None,
    row_slice: tuple[int, int] = (0, END), n_rows: int | None = None, cols: tuple[int, int] = (0, END),
) -> Tensor:  # fmt: skip
    """Log-sum-exp of the selected rows over the keys ``cols`` that they see, and with ``v`` the output.

    Other rows of the results stay unwritten.

    Args:
        rows: query indices of each sample; None: those of ``row_slice``.
        n_rows: the most rows that are taken of any sample; None: not known.
    """
    packed = masking.cu_q is not None
    total_q, heads, dim = q.shape[-3:]
    total_k = k.shape[-3]
    lse = q.new_empty((heads, total_q) if packed else (q.shape[0], heads, total_q), dtype=torch.float32)
    width = 16 if v is None else v.shape[-1]
    # The rows of packed sequences are unknown here; taking many costs the short ones little.
    most = n_rows if n_rows is not None else END if packed else total_q
    tile = forward_tile(dim, width, q.dtype, most)
    samples, tiles, search = (
        (1 if packed else q.shape[0]),
        triton.cdiv(most if rows is not None else min(most, total_q), tile.rows),
        False,
    )
    if packed:
        everywhere = total_q // tile.rows + masking.sequences + 1
        samples = masking.sequences
        search = n_rows is None or samples * tiles > everywhere
        if search:
            samples, tiles = 1, everywhere
    programs = samples * heads * tiles
    if programs > 0 and total_q > 0:
        _row_pass[(programs,)](
            q, k, v, masking.bias, masking.cu_q, masking.cu_k, rows, out, lse,
            *strides_of(q), *strides_of(k), *(strides_of(v) if v is not None else (0, 0, 0)), *masking.bias_strides,
            heads, heads // k.shape[-2], masking.sequences, total_q, total_k, tiles,
            0 if rows is None else rows.shape[0], *row_slice, cols[0], min(cols[1], total_k),
            *masking.factor_and_cap, masking.left, masking.right,
            SEARCH=search, D=dim, D_BLOCK=padded(dim), WIDTH=width, WIDTH_BLOCK=padded(width), CHUNK=tile.chunk,
            M=tile.rows, N=tile.keys, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return lse


# Kernels. Strides are 64-bit, so that offsets into large tensors are; lengths change from call to call and would
# compile a kernel anew for each kind of value if they were specialised on.


@triton.jit
def find_sequence(cu: tl.tensor, sequences: int, place: tl.tensor, TILE: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The sequence of the tile number ``place``, and that tile's number in it; ``sequences``: behind the last one.

    Sequence b has the tiles from cu[b] // TILE + b on, which is always room enough. That grows with b: bisection.
    """
    low = place * 0
    high = low + sequences
    while low < high:
        middle = (low + high + 1) // 2
        starts_after = tl.load(cu + middle) // TILE + middle > place
        low = tl.where(starts_after, low, middle)
        high = tl.where(starts_after, middle - 1, high)
    return low, place - (tl.load(cu + low) // TILE + low)


@triton.jit
def extent(
    cu: tl.tensor, number: tl.tensor, sequences: int, total: int, WITH_REST: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Where a sequence begins and its length. ``WITH_REST``: behind the last one is one more, of what is left."""
    if cu is None:
        return number * 0, number * 0 + total
    else:
        start = tl.load(cu + number)
        stop = tl.load(cu + tl.minimum(number + 1, sequences))
        if WITH_REST:
            stop = tl.where(number < sequences, stop, total)
        return start, stop - start


@triton.jit
def slice_of(begin: int, end: int, length: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """First item and number of items of ``[begin:end]``, negative bounds from the end."""
    first = tl.where(begin < 0, tl.maximum(length + begin, 0), tl.minimum(length, begin))
    stop = tl.where(end < 0, length + end, tl.minimum(length, end))
    return first, tl.maximum(stop - first, 0)


@triton.jit
def load_rows(
    x: tl.tensor, row: tl.tensor, stride: tl.tensor, inside: tl.tensor, D: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """The rows, 0 where not ``inside`` (None: all are) and beyond ``D`` channels."""
    d = tl.arange(0, BLOCK)[None, :]
    at = x + row[:, None] * stride + d
    if inside is None:
        if D == BLOCK:
            return tl.load(at)
        else:
            return tl.load(at, mask=d < D, other=0)
    else:
        if D == BLOCK:
            return tl.load(at, mask=inside[:, None], other=0)
        else:
            return tl.load(at, mask=inside[:, None] & (d < D), other=0)


@triton.jit
def chunked_products(
    a: tl.tensor,
    a_row: tl.tensor,
    a_stride: tl.tensor,
    a_inside: tl.tensor,
    b: tl.tensor,
    b_row: tl.tensor,
    b_stride: tl.tensor,
    b_inside: tl.tensor,
    A: tl.constexpr,
    B: tl.constexpr,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
) -> tl.tensor:
    """``[A,B]`` products of rows that are read piece by piece."""
    result = tl.zeros([A, B], tl.float32)
    for column in range(0, D, CHUNK):
        d = column + tl.arange(0, CHUNK)[None, :]
        a_part = tl.load(a + a_row[:, None] * a_stride + d, mask=a_inside[:, None] & (d < D), other=0)
        b_part = tl.load(b + b_row[:, None] * b_stride + d, mask=b_inside[:, None] & (d < D), other=0)
        result = tl.dot(a_part, tl.trans(b_part), result, input_precision="ieee")
    return result


@triton.jit
def _tanh(x: tl.tensor) -> tl.tensor:
    """Near 0, where the quotient of exponentials would cancel, by its series."""
    size = tl.abs(x)
    fading = tl.exp2(size * (-2 / _LN2))
    quotient = (1 - fading) / (1 + fading)
    square = x * x
    series = size * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(x < 0, -1.0, 1.0) * tl.where(size < 0.25, series, quotient)


@triton.jit
def capped(products: tl.tensor, factor: float, cap: float | None) -> tl.tensor:
    """Logits, without bias and mask. Multiplied by log2(e) only once a maximum has been subtracted, to stay exact."""
    if cap is None:
        return products * factor
    else:
        return cap * _tanh(products * factor)


@triton.jit
def sees(position: tl.tensor, key: tl.tensor, left: int | None, right: int | None) -> tl.tensor:
    """Whether the window at ``position`` has ``key``; they broadcast."""
    distance = key - position
    seen = distance == distance
    if left is not None:
        seen = seen & (distance >= -left)
    if right is not None:
        seen = seen & (distance <= right)
    return seen


@triton.jit
def _walk(
    peak: tl.tensor,
    total: tl.tensor,
    acc: tl.tensor,
    q_tile: tl.tensor,
    q: tl.tensor,
    row: tl.tensor,
    inside: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    bias: tl.tensor,
    q_row: tl.tensor,
    k_row: tl.tensor,
    v_row: tl.tensor,
    shift: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    limit: tl.tensor,
    factor: float,
    cap: float | None,
    left: int | None,
    right: int | None,
    EDGE: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Running softmax over the keys from ``begin`` to ``end``. Unless ``EDGE``, every row sees all of these."""
    for start in range(begin, end, N):
        key = start + tl.arange(0, N)
        there = None
        if EDGE:
            there = key < limit
        if CHUNK == D_BLOCK:
            products = tl.dot(
                q_tile, tl.trans(load_rows(k, key, k_row, there, D, D_BLOCK)), tl.zeros([M, N], tl.float32),
                input_precision="ieee",
            )  # fmt: skip
        else:
            products = chunked_products(q, row, q_row, inside, k, key, k_row, key < limit, M, N, D, CHUNK)
        logits = capped(products, factor, cap)
        if bias is not None:
            logits += tl.load(bias + key, mask=key < limit, other=0)[None, :]
        if EDGE:
            seen = sees((row + shift)[:, None], key[None, :], left, right) & (key < limit)[None, :]
            logits = tl.where(seen, logits, float("-inf"))
        top = tl.maximum(peak, tl.max(logits, 1))
        # A row that has seen nothing yet: exp(-inf - 0) is 0, where -inf - -inf would be NaN.
        base = tl.where(top == float("-inf"), 0.0, top)
        weight = tl.exp2((logits - base[:, None]) * LOG2E)
        fading = tl.exp2((peak - base) * LOG2E)
        total = total * fading + tl.sum(weight, 1)
        if v is not None:
            values = load_rows(v, key, v_row, there, WIDTH, WIDTH_BLOCK)
            acc = tl.dot(weight.to(values.dtype), values, acc * fading[:, None], input_precision="ieee")
        peak = top
    return peak, total, acc


@triton.jit(
    do_not_specialize=[
        "heads", "group", "sequences", "total_q", "total_k", "tiles", "n_rows", "row_begin", "row_end", "col_begin",
        "col_end", "left", "right",
    ]
)  # fmt: skip
def _row_pass(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    bias: tl.tensor,
    cu_q: tl.tensor,
    cu_k: tl.tensor,
    rows: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
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
    heads: int,
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
    SEARCH: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
) -> None:
    """Programs are (sample, head, tile of rows), the tiles that see the most keys first."""
    program = tl.program_id(0)
    place = program % tiles
    if right is not None:
        place = tiles - 1 - place
    head = program // tiles % heads
    number = program // tiles // heads
    if SEARCH:
        number, place = find_sequence(cu_q, sequences, place, M)
    q_start, n_q = extent(cu_q, number, sequences, total_q, True)
    k_start, n_k = extent(cu_k, number, sequences, total_k, False)
    sample = (number if cu_q is None else number * 0).to(tl.int64)
    q += sample * q_batch + q_start * q_row + head * q_head
    k += sample * k_batch + k_start * k_row + head // group * k_head
    if v is not None:
        v += sample * v_batch + k_start * v_row + head // group * v_head
    if bias is not None:
        bias += sample * bias_batch + k_start + head * bias_head

    item = place * M + tl.arange(0, M)
    if rows is None:
        first_row, count = slice_of(row_begin, row_end, n_q)
        row = first_row + item
        inside = item < count
    else:
        row = tl.load(rows + item, mask=item < n_rows, other=-1).to(tl.int32)
        inside = (row >= 0) & (row < n_q)

    # Keys: all from `low` to `high` are walked over; from `full_low` to `full_high` every row sees every key.
    shift = n_k - n_q
    lowest = tl.min(tl.where(inside, row, n_q))
    highest = tl.max(tl.where(inside, row, -1))
    col_first = tl.maximum(col_begin - k_start, 0)
    limit = tl.minimum(col_end - k_start, n_k)
    low = col_first
    high = tl.where(highest >= 0, limit, col_first)
    full_low = low
    full_high = high
    if left is not None:
        low = tl.maximum(low, lowest + shift - left)
        low -= (low - col_first) % N
        full_low = tl.maximum(low, highest + shift - left)
        full_low += (N - (full_low - col_first) % N) % N
    if right is not None:
        high = tl.minimum(high, highest + shift + right + 1)
        full_high = tl.minimum(high, lowest + shift + right + 1)
    full_high = tl.maximum(full_high, col_first)
    full_high = tl.maximum(full_high - (full_high - col_first) % N, full_low)

    peak = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, WIDTH_BLOCK], tl.float32)
    q_tile = None
    if CHUNK == D_BLOCK:
        q_tile = load_rows(q, row, q_row, inside, D, D_BLOCK)
    if left is not None:
        peak, total, acc = _walk(
            peak, total, acc, q_tile, q, row, inside, k, v, bias, q_row, k_row, v_row, shift,
            low, tl.minimum(full_low, high), limit, factor, cap, left, right,
            True, D, D_BLOCK, WIDTH, WIDTH_BLOCK, CHUNK, M, N,
        )  # fmt: skip
    peak, total, acc = _walk(
        peak, total, acc, q_tile, q, row, inside, k, v, bias, q_row, k_row, v_row, shift,
        full_low, full_high, limit, factor, cap, left, right,
        False, D, D_BLOCK, WIDTH, WIDTH_BLOCK, CHUNK, M, N,
    )  # fmt: skip
    peak, total, acc = _walk(
        peak, total, acc, q_tile, q, row, inside, k, v, bias, q_row, k_row, v_row, shift,
        full_high, high, limit, factor, cap, left, right,
        True, D, D_BLOCK, WIDTH, WIDTH_BLOCK, CHUNK, M, N,
    )  # fmt: skip

    # A row that saw nothing has peak -inf and total 0.
    total = tl.where(total == 0, 1.0, total)
    finished = tl.where(peak == float("inf"), peak, peak + tl.log2(total) * _LN2)
    tl.store(lse + (sample * heads + head) * total_q + q_start + row, finished, mask=inside)
    if out is not None:
        result = acc / total[:, None]
        d = tl.arange(0, WIDTH_BLOCK)[None, :]
        at = out + ((sample * total_q + q_start + row)[:, None] * heads + head) * WIDTH + d
        tl.store(at, result.to(out.dtype.element_ty), mask=inside[:, None] & (d < WIDTH))
