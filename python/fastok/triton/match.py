"""``bipartite_match`` in Triton. Semantics: ops/match.py, reference/match.py.

Five small kernels: norms; each source's best destination (similarities are used up as they are computed, never stored);
the r best sources, by counting for each how many are better; slot numbers, by a running count; the finished map.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import readable
from .merge import build_map

_NORM_ROWS, _NORM_COLUMNS = 16, 64  # per step of `_row_norms`
_RANK_TILE = 64  # sources compared at once by `_choose`
_SCAN_TILE = 1024  # places per step of `_number`
_ASSIGN_BLOCK = 256  # tokens per program of `_assign`

# `_best_destination` turns a ranking key into an int32 that sorts the same way, best first. Sources without a key come
# after every float (+inf is 0x7F800000), protected ones last.
_UNSCORED = tl.constexpr(0x7FFFFFFE)
_PROTECTED = tl.constexpr(0x7FFFFFFF)


def similarity_tile(dim: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Sources, destinations and channels that one step of the similarity kernel multiplies, and its warps.

    A function of one row only, so that a sample's result does not depend on its batch. fp32 products do not run on the
    tensor cores: twice the threads keep their unrolled loops within the registers.
    """
    return 64, 64, max(16, min(triton.next_power_of_2(max(dim, 1)), 32)), 8 if dtype == torch.float32 else 4


def bipartite_match(
    metric: Tensor,
    r: int,
    protect: int,
    threshold: float | None,
    bias: Tensor | None,
    src: Tensor | None,
    dst: Tensor | None,
    sorted_order: bool,
    static_shape: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``torch.ops.fastok.bipartite_match``: the map as ``(assign, counts, offsets, members)``.

    Waits for the device only if the shape depends on the data: without ``threshold`` and ``static_shape``.
    """
    batch, n, dim = metric.shape
    device = metric.device
    if src is None or dst is None:
        src = dst = None
        n_src, n_dst = (n + 1) // 2, n // 2
    else:
        src, dst = (positions.contiguous().expand(batch, positions.shape[-1]) for positions in (src, dst))
        n_src, n_dst = src.shape[1], dst.shape[1]
    identity = torch.arange(n, dtype=torch.int32, device=device)
    if n_src == 0 or n_dst == 0 or r <= 0:
        assign = identity.repeat(batch, 1)
        return assign, torch.full((batch,), n, dtype=torch.int32, device=device), *build_map(assign, n)

    # Each source's best destination, as that token's position (-1: this source may not merge), and its sort key.
    rows = readable(metric)
    norm = torch.empty(batch, n, dtype=torch.float32, device=device)
    scale = None if rows.dtype == torch.float16 else torch.empty_like(norm)
    _row_norms[(batch, triton.cdiv(n, _NORM_ROWS))](
        rows, norm, scale, rows.stride(0), rows.stride(1), n, dim, ROWS=_NORM_ROWS, COLUMNS=_NORM_COLUMNS
    )
    target = torch.empty(batch, n_src, dtype=torch.int32, device=device)
    code = torch.empty_like(target)
    m_tile, n_tile, d_tile, warps = similarity_tile(dim, rows.dtype)
    src_batch, dst_batch = (0 if listed is None else listed.stride(0) for listed in (src, dst))
    _best_destination[(batch, triton.cdiv(n_src, m_tile))](
        rows, norm, scale, None if bias is None else bias.contiguous(), src, dst, target, code,
        rows.stride(0), rows.stride(1), src_batch, dst_batch, n, dim, n_src, n_dst, protect, threshold,
        ALL_MAY_MERGE=static_shape and threshold is None, M=m_tile, N=n_tile, D=d_tile, num_warps=warps,
    )  # fmt: skip

    # head: the token whose slot each token takes. order: see `_choose`.
    head = identity.repeat(batch, 1)
    order = head.clone() if sorted_order else torch.full((batch, 3 * n), -1, dtype=torch.int32, device=device)
    order[:, :n] = identity
    _choose[(batch, triton.cdiv(max(n_src, n_dst), _RANK_TILE))](
        target, code, src, dst, head, order, src_batch, dst_batch, n, n_src, n_dst, protect, r,
        SORTED=sorted_order, TILE=_RANK_TILE,
    )  # fmt: skip

    slot, assign = torch.empty_like(head), torch.empty_like(head)
    counts = torch.empty(batch, dtype=torch.int32, device=device)
    _number[(batch,)](head, order, slot, counts, n, SORTED=sorted_order, TILE=_SCAN_TILE)
    _assign[(batch, triton.cdiv(n, _ASSIGN_BLOCK))](head, slot, counts, assign, n, BLOCK=_ASSIGN_BLOCK)
    if threshold is not None:
        n_out = n
    elif static_shape or batch == 0:
        n_out = n - r
    else:
        n_out = int(counts.max())
    return assign, counts, *build_map(assign, n_out)


# Kernels. Programs are (sample, tile); strides are 64-bit, so that offsets into large tensors are; counts that change
# from layer to layer are not specialised on.


@triton.jit
def _listed(positions: tl.tensor, index: tl.tensor, inside: tl.tensor, ODD: tl.constexpr) -> tl.tensor:
    """The tokens at ``index`` of a sample's list of ``positions``; None lists the even or the odd positions."""
    if positions is None:
        return 2 * index + ODD
    else:
        return tl.load(positions + index, mask=inside, other=0).to(tl.int32)


@triton.jit(do_not_specialize=["n"])
def _row_norms(
    x: tl.tensor,
    norm: tl.tensor,
    scale: tl.tensor,
    x_batch: tl.int64,
    x_row: tl.int64,
    n: int,
    dim: int,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """For each row, a power of two ``scale`` that brings it near 1, and ``norm``: max(norm, 1e-12), so scaled.

    fp16 needs no scale: its squares neither overflow nor vanish in fp32. The norm of a row that is not finite is NaN.
    """
    batch = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    x += batch * x_batch + row[:, None] * x_row
    factor = tl.full([ROWS], 1.0, tl.float32)
    if scale is not None:
        peak = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, dim, COLUMNS):
            column = start + tl.arange(0, COLUMNS)[None, :]
            peak = tl.maximum(peak, tl.abs(tl.load(x + column, mask=(row[:, None] < n) & (column < dim), other=0)))
        # 1 / 2^floor(log2(peak)), at most 2^99: the product of two norms that are 1e-12, so scaled, must not overflow.
        exponent = (tl.max(peak, 1).to(tl.int32, bitcast=True) >> 23) & 0xFF
        factor = (tl.minimum(tl.maximum(254 - exponent, 1), 226) << 23).to(tl.float32, bitcast=True)
        tl.store(scale + batch * n + row, factor, mask=row < n)
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, dim, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        value = tl.load(x + column, mask=(row[:, None] < n) & (column < dim), other=0).to(tl.float32) * factor[:, None]
        squares += value * value
    square = tl.sum(squares, 1)
    length = tl.where(square < float("inf"), tl.maximum(tl.sqrt_rn(square), 1e-12 * factor), float("nan"))
    tl.store(norm + batch * n + row, length, mask=row < n)


@triton.jit(do_not_specialize=["n", "n_src", "n_dst", "protect"])
def _best_destination(
    x: tl.tensor,
    norm: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    src: tl.tensor,
    dst: tl.tensor,
    target: tl.tensor,
    code: tl.tensor,
    x_batch: tl.int64,
    x_row: tl.int64,
    src_batch: tl.int64,
    dst_batch: tl.int64,
    n: int,
    dim: int,
    n_src: int,
    n_dst: int,
    protect: int,
    threshold: float | None,
    ALL_MAY_MERGE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
) -> None:
    batch = tl.program_id(0).to(tl.int64)
    x += batch * x_batch
    norm += batch * n
    if src is not None:
        src += batch * src_batch
        dst += batch * dst_batch
    i = tl.program_id(1) * M + tl.arange(0, M)
    source = _listed(src, i, i < n_src, 0)
    a_rows = x + source[:, None] * x_row
    a_norm = tl.load(norm + source, mask=i < n_src, other=1)
    if scale is not None:
        scale += batch * n
        a_scale = tl.load(scale + source, mask=i < n_src, other=1)

    best = tl.full([M], float("-inf"), tl.float32)
    mate = tl.zeros([M], tl.int32)
    lowest = n_dst  # the first destination that is not protected
    for start in range(0, n_dst, N):
        j = start + tl.arange(0, N)
        destination = _listed(dst, j, j < n_dst, 1)
        allowed = (j < n_dst) & (destination >= protect)
        b_rows = x + destination[:, None] * x_row
        if scale is not None:
            b_scale = tl.load(scale + destination, mask=j < n_dst, other=1)
        product = tl.zeros([M, N], tl.float32)
        for column in range(0, dim, D):
            d = column + tl.arange(0, D)[None, :]
            a = tl.load(a_rows + d, mask=(i[:, None] < n_src) & (d < dim), other=0)
            b = tl.load(b_rows + d, mask=(j[:, None] < n_dst) & (d < dim), other=0)
            if scale is not None:
                a = (a * a_scale[:, None]).to(x.dtype.element_ty)
                b = (b * b_scale[:, None]).to(x.dtype.element_ty)
            product = tl.dot(a, tl.trans(b), product, input_precision="ieee")
        # One correctly rounded division by both norms: with a single channel every cosine is exactly 1 or -1, and ties.
        b_norm = tl.load(norm + destination, mask=j < n_dst, other=1)
        cosine = tl.div_rn(product, a_norm[:, None] * b_norm[None, :])
        cosine = tl.where(allowed[None, :] & (cosine == cosine), cosine, float("-inf"))
        top, place = tl.max(cosine, 1, return_indices=True, return_indices_tie_break_left=True)
        mate = tl.where(top > best, start + place, mate)
        best = tl.maximum(best, top)
        lowest = tl.minimum(lowest, tl.min(tl.where(allowed, j, n_dst)))

    key = best
    if bias is not None:
        key += tl.load(bias + batch * n + source, mask=i < n_src, other=0)
    free = (i < n_src) & (source >= protect)
    scored = free & (best > float("-inf")) & (key == key)
    eligible = scored
    if ALL_MAY_MERGE:
        eligible = free
    elif threshold is not None:
        eligible = scored & (best > threshold)
    mate = tl.where(scored, mate, tl.where(lowest < n_dst, lowest, 0))
    tl.store(target + batch * n_src + i, tl.where(eligible, _listed(dst, mate, i < n_src, 1), -1), mask=i < n_src)
    # Both zeros become one; then a negative float's order is that of its other bits, inverted.
    bits = tl.where(key == 0, 0.0, -key).to(tl.int32, bitcast=True)
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ascending = tl.where(scored, ascending, tl.where(free, _UNSCORED, _PROTECTED))
    tl.store(code + batch * n_src + i, ascending, mask=i < n_src)


@triton.jit(do_not_specialize=["n", "n_src", "n_dst", "protect", "r"])
def _choose(
    target: tl.tensor,
    code: tl.tensor,
    src: tl.tensor,
    dst: tl.tensor,
    head: tl.tensor,
    order: tl.tensor,
    src_batch: tl.int64,
    dst_batch: tl.int64,
    n: int,
    n_src: int,
    n_dst: int,
    protect: int,
    r: int,
    SORTED: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Merge the r best sources that may, and prepare the numbering of those that keep their slot, the heads.

    ``order``, which comes as the identity padded with -1, becomes for "sorted" each head's lowest member ``[B,N]``, for
    "tome" the heads in their order with gaps ``[B,3N]``: protected and unlisted tokens, kept sources, destinations.
    """
    batch = tl.program_id(0).to(tl.int64)
    if src is not None:
        src += batch * src_batch
        dst += batch * dst_batch
    target += batch * n_src
    code += batch * n_src
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mine = tl.load(code + i, mask=i < n_src, other=_PROTECTED)
    better = tl.zeros([TILE, TILE], tl.int32)
    better_eligible = tl.zeros([TILE, TILE], tl.int32)
    for start in range(0, n_src, TILE):
        j = start + tl.arange(0, TILE)
        other = tl.load(code + j, mask=j < n_src, other=_PROTECTED)[None, :]
        eligible = tl.load(target + j, mask=j < n_src, other=-1)[None, :] >= 0
        wins = (other < mine[:, None]) | ((other == mine[:, None]) & (j[None, :] < i[:, None]))
        better += wins.to(tl.int32)
        better_eligible += (wins & eligible).to(tl.int32)

    source = _listed(src, i, i < n_src, 0)
    mate = tl.load(target + i, mask=i < n_src, other=-1)
    merged = (mate >= 0) & (tl.sum(better_eligible, 1) < r)
    tl.store(head + batch * n + source, mate, mask=merged)
    if SORTED:
        tl.atomic_min(order + batch * n + mate, source, mask=merged, sem="relaxed")
    else:
        order += batch * 3 * n
        free = (i < n_src) & (source >= protect)
        place = tl.where(protect == 0, tl.sum(better, 1), source)
        tl.store(order + source, -1, mask=free)
        tl.store(order + n + place, source, mask=free & ~merged)
        destination = _listed(dst, i, i < n_dst, 1)
        free = (i < n_dst) & (destination >= protect)
        tl.store(order + destination, -1, mask=free)
        tl.store(order + 2 * n + i, destination, mask=free)


@triton.jit(do_not_specialize=["n"])
def _number(
    head: tl.tensor,
    order: tl.tensor,
    slot: tl.tensor,
    counts: tl.tensor,
    n: int,
    SORTED: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Number the heads of one sample: ``slot`` of each, and how many there are."""
    batch = tl.program_id(0).to(tl.int64)
    slot += batch * n
    places = n if SORTED else 3 * n
    order += batch * places
    used = 0
    for start in range(0, places, TILE):
        place = start + tl.arange(0, TILE)
        if SORTED:
            token = tl.load(head + batch * n + place, mask=place < places, other=0)
            leads = (place < places) & (tl.load(order + token) == place)
        else:
            token = tl.load(order + place, mask=place < places, other=-1)
            leads = token >= 0
        step = leads.to(tl.int32)
        tl.store(slot + token, used + tl.cumsum(step) - step, mask=leads)
        used += tl.sum(step)
    tl.store(counts + batch, used)


@triton.jit(do_not_specialize=["n"])
def _assign(
    head: tl.tensor, slot: tl.tensor, counts: tl.tensor, assign: tl.tensor, n: int, BLOCK: tl.constexpr
) -> None:
    """Every token takes its head's slot; a sample in which nothing merged keeps its original order."""
    batch = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    taken = tl.load(slot + batch * n + tl.load(head + batch * n + i, mask=i < n, other=0))
    unchanged = tl.load(counts + batch) == n
    tl.store(assign + batch * n + i, tl.where(unchanged, i, taken), mask=i < n)
