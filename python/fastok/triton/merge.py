"""``build_map``, ``merge``, ``merge_backward``, ``unmerge`` in Triton. Semantics: ops/merge.py, reference/merge.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import kernel_dtype, readable

# Tokens and slots compared at once by `_build_map`.
_MAP_TILE = 64


def row_block(channels: int) -> tuple[int, int]:
    """Channels that one program handles, and its warps: 16 bytes of fp16 per thread and load, at most 4 warps."""
    block = min(triton.next_power_of_2(max(channels, 1)), 1024)
    return block, max(block // 256, 1)


def _accumulator(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def build_map(assign: Tensor, n_out: int) -> tuple[Tensor, Tensor]:
    """``torch.ops.fastok.build_map``: places found by counting, so without atomics, sorting or scratch memory."""
    assign = assign.contiguous()
    batch, n = assign.shape
    offsets = assign.new_empty(batch, n_out + 1)
    members = torch.empty_like(assign)
    if batch > 0:
        grid = (batch, triton.cdiv(max(n, n_out + 1), _MAP_TILE))
        _build_map[grid](assign, offsets, members, n, n_out, TILE=_MAP_TILE, num_warps=8)
    return offsets, members


def merge(
    x: Tensor, assign: Tensor, offsets: Tensor, members: Tensor, size: Tensor | None, mode: str
) -> tuple[Tensor, Tensor]:
    """``torch.ops.fastok.merge``: one program per slot and block of channels walks the slot's members in order."""
    batch, n, channels = x.shape
    n_out = offsets.shape[1] - 1
    rows = readable(x)
    y = torch.empty(batch, n_out, channels, dtype=rows.dtype, device=x.device)
    size_out = torch.empty(batch, n_out, dtype=torch.float32, device=x.device)
    if size_out.numel() > 0:
        block, warps = row_block(channels)
        grid = (batch * n_out, max(triton.cdiv(channels, block), 1))
        _merge[grid](
            rows, offsets.contiguous(), members.contiguous(), None if size is None else size.contiguous(), y, size_out,
            rows.stride(0), rows.stride(1), n, n_out, channels,
            MODE=mode, ACC=_accumulator(x.dtype), BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return y.to(x.dtype), size_out


def merge_backward(
    grad_y: Tensor,
    x: Tensor,
    y: Tensor,
    assign: Tensor,
    offsets: Tensor,
    members: Tensor,
    size: Tensor | None,
    size_out: Tensor,
    mode: str,
) -> Tensor:
    """``torch.ops.fastok.merge_backward``: by token, except ``"max"``, where a slot's members take turns."""
    batch, n, channels = x.shape
    n_out = offsets.shape[1] - 1
    grads, acc = readable(grad_y), _accumulator(grad_y.dtype)
    offsets, members = offsets.contiguous(), members.contiguous()
    block, warps = row_block(channels)
    blocks = triton.cdiv(channels, block)
    if mode == "max":
        rows, tops = readable(x), readable(y)
        # Zeros, because dropped tokens belong to no slot.
        grad_x = torch.zeros(batch, n, channels, dtype=rows.dtype, device=x.device)
        if grads.numel() > 0:
            _merge_backward_max[(batch * n_out, blocks)](
                grads, rows, tops, offsets, members, grad_x,
                grads.stride(0), grads.stride(1), rows.stride(0), rows.stride(1), tops.stride(0), tops.stride(1),
                n, n_out, channels,
                ACC=acc, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    else:
        grad_x = torch.empty(batch, n, channels, dtype=kernel_dtype(x.dtype), device=x.device)
        if grad_x.numel() > 0:
            _merge_backward[(batch * n, blocks)](
                grads, assign.contiguous(), offsets, members, None if size is None else size.contiguous(),
                size_out.contiguous(), grad_x, grads.stride(0), grads.stride(1), n, n_out, channels,
                MODE=mode, ACC=acc, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return grad_x.to(x.dtype)


def unmerge(y: Tensor, assign: Tensor, offsets: Tensor, members: Tensor, residual: Tensor | None) -> Tensor:
    """``torch.ops.fastok.unmerge``: one program per token and block of channels."""
    batch, n = assign.shape
    channels = y.shape[2]
    rows = readable(y)
    rest = None if residual is None else readable(residual)
    out = torch.empty(batch, n, channels, dtype=rows.dtype, device=y.device)
    if out.numel() > 0:
        block, warps = row_block(channels)
        _unmerge[(batch * n, triton.cdiv(channels, block))](
            rows, assign.contiguous(), rest, out, rows.stride(0), rows.stride(1),
            0 if rest is None else rest.stride(0), 0 if rest is None else rest.stride(1), n, channels,
            ACC=_accumulator(y.dtype), BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return out.to(y.dtype)


# Kernels. Strides are 64-bit, so that offsets into large tensors are; token counts change from layer to layer and would
# compile a kernel anew for each kind of value if they were specialised on.


@triton.jit(do_not_specialize=["n", "n_out"])
def _build_map(
    assign: tl.tensor, offsets: tl.tensor, members: tl.tensor, n: int, n_out: int, TILE: tl.constexpr
) -> None:
    """For token i, its place in ``members``; for slot i, its offset. Both count the tokens that come before."""
    batch = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    assign += batch * n
    slot = tl.load(assign + i, mask=i < n, other=-1)
    slot = tl.where(slot < 0, n_out, slot)
    place = tl.zeros([TILE, TILE], tl.int32)
    offset = tl.zeros([TILE, TILE], tl.int32)
    for start in range(0, n, TILE):
        j = start + tl.arange(0, TILE)
        other = tl.load(assign + j, mask=j < n, other=-1)
        # Past the end, as for dropped tokens, n_out: not below any slot, and j is above every i.
        other = tl.where(other < 0, n_out, other)[None, :]
        place += ((other < slot[:, None]) | ((other == slot[:, None]) & (j[None, :] < i[:, None]))).to(tl.int32)
        offset += (other < i[:, None]).to(tl.int32)
    tl.store(members + batch * n + tl.sum(place, 1), tl.where(slot < n_out, i, -1), mask=i < n)
    tl.store(offsets + batch * (n_out + 1) + i, tl.sum(offset, 1), mask=i <= n_out)


@triton.jit(do_not_specialize=["n", "n_out"])
def _merge(
    x: tl.tensor,
    offsets: tl.tensor,
    members: tl.tensor,
    size: tl.tensor,
    y: tl.tensor,
    size_out: tl.tensor,
    x_batch: tl.int64,
    x_row: tl.int64,
    n: int,
    n_out: int,
    channels: int,
    MODE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    batch = row // n_out
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < channels
    x += batch * x_batch
    members += batch * n
    # A sample has one offset more than slots.
    first = tl.load(offsets + row + batch)
    last = tl.load(offsets + row + batch + 1)

    if size is None:
        total = (last - first).to(ACC)
    else:
        size += batch * n
        total = tl.full([], 0, ACC)
        for k in range(first, last):
            total += tl.load(size + tl.load(members + k)).to(ACC)
    tl.store(size_out + row, total.to(tl.float32), mask=tl.program_id(1) == 0)

    result = tl.zeros([BLOCK], ACC)
    if MODE == "first":
        token = tl.load(members + first, mask=first < last, other=0)
        width = tl.where(first < last, channels, 0)
        result = tl.load(x + token * x_row + column, mask=column < width, other=0).to(ACC)
    else:
        for k in range(first, last):
            token = tl.load(members + k)
            value = tl.load(x + token * x_row + column, mask=inside, other=0).to(ACC)
            if MODE == "max":
                result = tl.where((k == first) | (value > result) | (value != value), value, result)
            elif MODE == "sum":
                result += value
            else:
                result += value * _share(size, token, total)
        if MODE == "mean":
            result = tl.where(total == 0, 0, result)
    tl.store(y + row * channels + column, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _share(size: tl.tensor, token: tl.tensor, total: tl.tensor) -> tl.tensor:
    """Weight of ``token`` in its slot's mean, rounded correctly: exactly 1 for an only member."""
    weight = 1.0 if size is None else tl.load(size + token).to(total.dtype)
    if total.dtype == tl.float64:
        return weight / total
    else:
        return tl.div_rn(weight, total)


@triton.jit(do_not_specialize=["n", "n_out"])
def _merge_backward(
    grad_y: tl.tensor,
    assign: tl.tensor,
    offsets: tl.tensor,
    members: tl.tensor,
    size: tl.tensor,
    size_out: tl.tensor,
    grad_x: tl.tensor,
    grad_batch: tl.int64,
    grad_row: tl.int64,
    n: int,
    n_out: int,
    channels: int,
    MODE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    batch = row // n
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < channels
    slot = tl.load(assign + row)
    receives = slot >= 0
    if MODE == "first":
        first = tl.load(offsets + batch * (n_out + 1) + slot, mask=receives, other=0)
        receives = receives & (tl.load(members + batch * n + first) == row % n)
    width = tl.where(receives, channels, 0)
    grad = tl.load(grad_y + batch * grad_batch + slot * grad_row + column, mask=column < width, other=0).to(ACC)
    if MODE == "mean":
        total = tl.load(size_out + batch * n_out + slot, mask=receives, other=0).to(ACC)
        share = _share(size, row, tl.where(total == 0, 1, total))
        grad = grad * tl.where(total == 0, 0, share)
    tl.store(grad_x + row * channels + column, grad.to(grad_x.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n", "n_out"])
def _merge_backward_max(
    grad_y: tl.tensor,
    x: tl.tensor,
    y: tl.tensor,
    offsets: tl.tensor,
    members: tl.tensor,
    grad_x: tl.tensor,
    grad_batch: tl.int64,
    grad_row: tl.int64,
    x_batch: tl.int64,
    x_row: tl.int64,
    y_batch: tl.int64,
    y_row: tl.int64,
    n: int,
    n_out: int,
    channels: int,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    batch = row // n_out
    slot = row % n_out
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < channels
    grad = tl.load(grad_y + batch * grad_batch + slot * grad_row + column, mask=inside, other=0).to(ACC)
    top = tl.load(y + batch * y_batch + slot * y_row + column, mask=inside, other=0)
    open_ = inside
    for k in range(tl.load(offsets + row + batch), tl.load(offsets + row + batch + 1)):
        token = tl.load(members + batch * n + k)
        value = tl.load(x + batch * x_batch + token * x_row + column, mask=inside, other=0)
        wins = open_ & ((value == top) | ((value != value) & (top != top)))
        mine = tl.where(wins, grad, 0).to(grad_x.dtype.element_ty)
        tl.store(grad_x + (batch * n + token) * channels + column, mine, mask=inside)
        open_ = open_ & ~wins


@triton.jit(do_not_specialize=["n"])
def _unmerge(
    y: tl.tensor,
    assign: tl.tensor,
    residual: tl.tensor,
    out: tl.tensor,
    y_batch: tl.int64,
    y_row: tl.int64,
    residual_batch: tl.int64,
    residual_row: tl.int64,
    n: int,
    channels: int,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    batch = row // n
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < channels
    slot = tl.load(assign + row)
    width = tl.where(slot >= 0, channels, 0)
    result = tl.load(y + batch * y_batch + slot * y_row + column, mask=column < width, other=0).to(ACC)
    if residual is not None:
        result += tl.load(residual + batch * residual_batch + row % n * residual_row + column, mask=inside).to(ACC)
    tl.store(out + row * channels + column, result.to(out.dtype.element_ty), mask=inside)
