"""``merge`` and ``unmerge``: what a TokenMap does to tokens. Checks, fake kernels, autograd; kernels in csrc/merge."""

from typing import TYPE_CHECKING, Any, Union

import torch
from torch import Tensor

from .autograd import call, only_once
from .checks import (
    FLOATS,
    check_at_least,
    check_dtype,
    check_range,
    check_same_device,
    check_shape,
    check_tensor,
    has_values,
)

if TYPE_CHECKING:
    from ..token_map import SoftMap, TokenMap

MODES = ("mean", "sum", "max", "first")


def checked_assign(assign: Tensor, n_out: int) -> Tensor:
    """``assign`` as contiguous int32, its shape and values checked."""
    check_at_least("n_out", n_out, 0)
    check_shape("assign", assign, (None, None), "[B,N]")
    check_range("assign", assign, -1, n_out)
    return assign.to(torch.int32).contiguous()


def checked_counts(counts: Tensor, assign: Tensor, n_out: int) -> Tensor:
    """``counts`` as contiguous int32, its shape and values checked."""
    check_shape("counts", counts, (assign.shape[0],), "[B]")
    check_same_device("counts", counts, "assign", assign.device)
    check_range("counts", counts, 0, n_out + 1)
    if has_values(counts) and has_values(assign) and assign.numel() > 0:
        used = assign.amax(1) + 1
        if bool((counts < used).any()):
            raise ValueError(f"counts must cover the slots that assign uses, {used.tolist()}; got {counts.tolist()}")
    return counts.to(torch.int32).contiguous()


def checked_indices(indices: Tensor, n_in: int) -> Tensor:
    """Kept ``indices`` as int64, each in range and at most once per row."""
    check_at_least("n_in", n_in, 0)
    check_shape("indices", indices, (None, None), "[B,K]")
    check_range("indices", indices, 0, n_in)
    indices = indices.long()
    if has_values(indices) and indices.shape[1] > 1:
        ascending = indices.sort(dim=1).values
        if bool((ascending[:, 1:] == ascending[:, :-1]).any()):
            raise ValueError("indices must be different within a row, got a repeated index")
    return indices


def check_composable(first: Union["TokenMap", "SoftMap"], then: Union["TokenMap", "SoftMap"]) -> None:
    """``then`` is a map that takes as many tokens, of as many samples, as ``first`` gives."""
    if not hasattr(then, "batch_size"):
        raise TypeError(f"other must be a TokenMap or a SoftMap, got {type(then).__name__} {then!r}")
    if then.batch_size != first.batch_size or then.n_in != first.n_out:
        raise ValueError(
            f"other must take what this map gives, batch {first.batch_size} and {first.n_out} tokens; "
            f"got batch {then.batch_size} and {then.n_in} tokens"
        )


def check_input_side(x: Tensor, token_map: Union["TokenMap", "SoftMap"], size: Tensor | None) -> None:
    """``x`` and ``size`` fit the map's input side."""
    check_dtype("x", x, FLOATS)
    batch, n = token_map.batch_size, token_map.n_in
    check_shape("x", x, (batch, n, None), "[B,N,C] of the token map")
    check_same_device("x", x, "the token map", token_map.device)
    if size is not None:
        check_dtype("size", size, (torch.float32,))
        check_shape("size", size, (batch, n), "[B,N] of the token map")
        check_same_device("size", size, "the token map", token_map.device)


def check_packable(x: Tensor, token_map: "TokenMap") -> None:
    """``x`` is ``[B,M,…]``."""
    check_tensor("x", x)
    batch, n_out = token_map.batch_size, token_map.n_out
    if x.dim() < 2 or x.shape[0] != batch or x.shape[1] != n_out:
        raise ValueError(f"x must be [B,M,…] of the token map, here [{batch}, {n_out}, …]; got {list(x.shape)}")
    check_same_device("x", x, "the token map", token_map.device)


def check_output_side(y: Tensor, token_map: Union["TokenMap", "SoftMap"], residual: Tensor | None) -> None:
    """``y`` and ``residual`` fit the map's output side."""
    check_dtype("y", y, FLOATS)
    check_shape("y", y, (token_map.batch_size, token_map.n_out, None), "[B,M,C] of the token map")
    check_same_device("y", y, "the token map", token_map.device)
    if residual is not None:
        check_dtype("residual", residual, (y.dtype,))
        check_shape("residual", residual, (y.shape[0], token_map.n_in, y.shape[2]), "[B,N,C]")
        check_same_device("residual", residual, "the token map", token_map.device)


@torch.library.register_fake("fastok::build_map")
def _build_map_fake(assign: Tensor, n_out: int) -> tuple[Tensor, Tensor]:
    return assign.new_empty(assign.shape[0], n_out + 1), torch.empty_like(assign)


@torch.library.register_fake("fastok::merge")
def _merge_fake(
    x: Tensor, assign: Tensor, offsets: Tensor, members: Tensor, size: Tensor | None, mode: str
) -> tuple[Tensor, Tensor]:
    batch, n_out = x.shape[0], offsets.shape[1] - 1
    return x.new_empty(batch, n_out, x.shape[2]), x.new_empty(batch, n_out, dtype=torch.float32)


@torch.library.register_fake("fastok::merge_backward")
def _merge_backward_fake(grad_y: Tensor, x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("fastok::unmerge")
def _unmerge_fake(y: Tensor, assign: Tensor, offsets: Tensor, members: Tensor, residual: Tensor | None) -> Tensor:
    return y.new_empty(y.shape[0], assign.shape[1], y.shape[2])


def _merge_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, assign, offsets, members, size, mode = inputs
    y, size_out = output
    ctx.mode = mode
    ctx.save_for_backward(x, y, assign, offsets, members, size, size_out)


def _merge_autograd(ctx: Any, grad_y: Tensor, grad_size_out: Tensor) -> tuple[Tensor | None, ...]:
    x, y, assign, offsets, members, size, size_out = ctx.saved_tensors
    grad_x = grad_size = None
    if ctx.needs_input_grad[0]:
        grad_x = call(torch.ops.fastok.merge_backward, grad_y, x, y, assign, offsets, members, size, size_out, ctx.mode)
    if ctx.needs_input_grad[4]:
        grad_size = _size_gradient(ctx.mode, x, y, assign, offsets, members, size_out, grad_y, grad_size_out)
    return grad_x, None, None, None, grad_size, None


def _size_gradient(
    mode: str,
    x: Tensor,
    y: Tensor,
    assign: Tensor,
    offsets: Tensor,
    members: Tensor,
    size_out: Tensor,
    grad_y: Tensor,
    grad_size_out: Tensor,
) -> Tensor:
    """d/d size[i] = grad_size_out[slot] + <grad_y[slot], x[i] - y[slot]> / size_out[slot] (second term: mean only)."""

    def spread(rows: Tensor) -> Tensor:
        return torch.ops.fastok.unmerge(rows.contiguous(), assign, offsets, members, None)

    grad = spread(grad_size_out[..., None])[..., 0]
    if mode != "mean":
        return grad
    slope = (spread(grad_y.float()) * (x.float() - spread(y.float()))).sum(-1)
    total = spread(size_out[..., None])[..., 0]
    return grad + torch.where(total == 0, 0, slope / torch.where(total == 0, 1, total))


def _unmerge_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:4])


def _unmerge_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_y = None
    if ctx.needs_input_grad[0]:
        grad_y = torch.ops.fastok.merge(grad, *ctx.saved_tensors, None, "sum")[0]
    return grad_y, None, None, None, grad if ctx.needs_input_grad[4] else None


only_once("fastok::merge_backward")
torch.library.register_autograd("fastok::merge", _merge_autograd, setup_context=_merge_setup)
torch.library.register_autograd("fastok::unmerge", _unmerge_autograd, setup_context=_unmerge_setup)
