"""Specification of ``merge``, ``unmerge`` and ``build_map``: plain PyTorch, fp32 (fp64 for fp64 input), any device."""

import torch
from torch import Tensor


def build_map(assign: Tensor, n_out: int) -> tuple[Tensor, Tensor]:
    """``assign`` int32 ``[B,N]`` (-1 = dropped) as CSR: ``offsets[B,M+1]``, ``members[B,N]`` padded with -1."""
    batch = assign.shape[0]
    slot = torch.where(assign < 0, n_out, assign).long()
    members = slot.argsort(dim=1, stable=True)
    members = torch.where(slot.gather(1, members) == n_out, -1, members)
    lengths = torch.zeros(batch, n_out + 1, dtype=torch.int64, device=assign.device)
    lengths = lengths.scatter_add(1, slot, torch.ones_like(slot))
    offsets = torch.nn.functional.pad(lengths[:, :n_out].cumsum(1), (1, 0))
    return offsets.int(), members.int()


def _slots(assign: Tensor, n_out: int) -> Tensor:
    """``assign`` as int64 ``[B,N]`` with dropped tokens sent to the spare slot ``n_out``."""
    return torch.where(assign < 0, n_out, assign).long()


def merge(
    x: Tensor, assign: Tensor, offsets: Tensor, members: Tensor, size: Tensor | None, mode: str
) -> tuple[Tensor, Tensor]:
    """``torch.ops.fastok.merge``: tokens ``x[B,N,C]`` reduced per slot, ``(y[B,M,C], size_out[B,M])``."""
    batch, n, channels = x.shape
    n_out = offsets.shape[1] - 1
    acc = x if x.dtype == torch.float64 else x.float()
    weight = acc.new_ones(batch, n) if size is None else size.to(acc.dtype)
    slot = _slots(assign, n_out)
    size_out = weight.new_zeros(batch, n_out + 1).scatter_add(1, slot, weight)[:, :n_out]
    empty = (offsets[:, 1:] == offsets[:, :-1])[..., None]
    if mode == "first":
        first = members.long().gather(1, offsets[:, :-1].long().clamp(max=max(n - 1, 0))).clamp(min=0) if n else slot
        y = x.gather(1, first[..., None].expand(-1, -1, channels)) if n else acc.new_zeros(batch, n_out, channels)
        return torch.where(empty, 0, y).to(x.dtype), size_out.float()
    wide = slot[..., None].expand(-1, -1, channels)
    if mode == "max":
        y = acc.new_zeros(batch, n_out + 1, channels).scatter_reduce(1, wide, acc, "amax", include_self=False)[
            :, :n_out
        ]
    else:
        if mode == "mean":
            total = torch.where(size_out == 0, 1, size_out)
            share = weight / torch.nn.functional.pad(total, (0, 1), value=1.0).gather(1, slot)
            alive = torch.nn.functional.pad(size_out != 0, (0, 1)).gather(1, slot)[..., None]
            acc = torch.where(alive, acc * share[..., None], 0)
        y = acc.new_zeros(batch, n_out + 1, channels).scatter_add(1, wide, acc)
    return torch.where(empty, 0, y[:, :n_out]).to(x.dtype), size_out.float()


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
    """``torch.ops.fastok.merge_backward``: gradient of ``merge``'s ``y`` with respect to ``x``.

    In mode ``"max"`` the gradient of a channel goes to the lowest-index member that holds the maximum.
    """
    batch, n, _ = x.shape
    n_out = offsets.shape[1] - 1
    slot = _slots(assign, n_out)

    def spread(per_slot: Tensor) -> Tensor:
        """Each token's slot's row of ``[B,M,·]``; dropped tokens get 0."""
        rows = torch.nn.functional.pad(per_slot, (0, 0, 0, 1))
        return rows.gather(1, slot[..., None].expand(-1, -1, per_slot.shape[2]))

    grad = spread(grad_y if grad_y.dtype == torch.float64 else grad_y.float())
    position = torch.arange(n, device=x.device).expand(batch, n)
    if mode == "mean":
        total = spread(size_out[..., None].to(grad.dtype))
        weight = torch.ones_like(total) if size is None else size[..., None].to(grad.dtype)
        grad = grad * torch.where(total == 0, 0, weight / torch.where(total == 0, 1, total))
    elif mode in ("first", "max"):
        holds = torch.ones(batch, n, 1, dtype=torch.bool, device=x.device)
        if mode == "max":
            top = spread(y)
            holds = (x == top) | (x.isnan() & top.isnan())
        candidate = torch.where(holds, position[..., None], n)
        wide = slot[..., None].expand_as(candidate)
        winner = torch.full((batch, n_out + 1, candidate.shape[2]), n, device=x.device)
        winner = winner.scatter_reduce(1, wide, candidate, "amin")[:, :n_out]
        grad = torch.where(spread(winner) == position[..., None], grad, 0)
    return grad.to(x.dtype)


def unmerge(y: Tensor, assign: Tensor, offsets: Tensor, members: Tensor, residual: Tensor | None) -> Tensor:
    """``torch.ops.fastok.unmerge``: every token its slot's row of ``y[B,M,C]``, dropped tokens 0, plus ``residual``."""
    slot = _slots(assign, y.shape[1])[..., None].expand(-1, -1, y.shape[2])
    out = torch.nn.functional.pad(y, (0, 0, 0, 1)).gather(1, slot)
    if residual is None:
        return out
    acc = out if out.dtype == torch.float64 else out.float()
    return (acc + residual).to(y.dtype)
