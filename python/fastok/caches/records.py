"""What `packed` does with bytes: moving parts of records, and the channels that a first page decides."""

import torch
from torch import Tensor

from ..reference.kv_layout import Addresses, Side
from ..reference.quantize import gather_bytes, scatter_bytes


def channels_of(x: Tensor, side: Side, per_head: bool) -> Tensor | None:
    """fp16 ``[B,G,D]``: the factors, or the hard channels, that pages ``x[B,page,G,D]`` decide; None if none are."""
    batch, _, groups, width = x.shape
    x = x.float()
    if side.channel_scale:
        factor = x.abs().nan_to_num(0, 0, 0).amax(1).sqrt().half()
        return torch.where((factor > 0) & factor.isfinite(), factor, 1)
    if not side.hard:
        return None
    over = (1,) if per_head else (0, 1, 2) if side.compat else (1, 2)
    span = (x.amax(over, keepdim=True) - x.amin(over, keepdim=True)).nan_to_num(-1, torch.inf)
    rank = span.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (rank < side.hard).half()[:, 0].expand(batch, groups, width).contiguous()


def by_page(x: Tensor, order: Tensor) -> Tensor:
    """``x[B,G,pages,*]`` with its pages in another order ``[B,G,pages]``."""
    return x.gather(2, order[..., None].expand(*order.shape, x.shape[3]))


def move(source: Tensor, old: Addresses, target: Tensor, new: Addresses, stays: Tensor, place: Tensor) -> None:
    """Copy the rows of the entries that stay, and the parameters that they use, to where they are now."""
    layout = old.layout
    for which, side in enumerate((layout.key, layout.value)):
        of_class = [(stays if old.high is None else stays & old.high, side.row_bytes())]
        if old.high is not None:
            of_class.append((stays & ~old.high, side.row_bytes(False)))
        for chosen, size in of_class:
            to = new.codes[which].gather(-1, place)[chosen]
            scatter_bytes(target, to, gather_bytes(source, old.codes[which][chosen], size))
        for start, end, width in zip(old.arrays[which], new.arrays[which], side.array_widths, strict=True):
            moved = gather_bytes(source, start[stays], width * side.scale_bytes)
            scatter_bytes(target, end.gather(-1, place)[stays], moved)
