"""What `packed` does with bytes: checks and moves of records, and the channels that a first page decides."""

import torch
from torch import Tensor

from ..reference.kv_layout import Addresses, Layout, Side, pack_bits, unpack_bits
from ..reference.quantize import gather_bytes, scatter_bytes
from .memory import records

CHUNK = 64  # pages that `compacted` moves at a time


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


def blank_channels(side: Side, of_heads: Tensor) -> Tensor:
    """fp16 ``[B,G,D]`` for heads ``of_heads[B,G]`` that have no page yet: well-formed, and no more."""
    first = torch.arange(side.width, device=of_heads.device) < side.hard
    blank = torch.ones_like(first) if side.channel_scale else first
    return blank.half().expand(*of_heads.shape, -1).clone()


def decide_channels(
    channels: Tensor, x: Tensor, side: Side, per_head: bool, new: list[tuple[int, int, int]], chosen: list[list[bool]]
) -> None:
    """Write the channels that first pages ``x[n,page,1,D]`` decide into ``channels[B,G,D]``.

    ``new``: pages that are a head's first, as ``(i, b, g)``. Where heads share their hard channels, a sequence's first
    ones decide, unless some of its heads are ``chosen`` already.
    """
    alone = side.channel_scale or per_head
    for b in sorted({b for _, b, _ in new}):
        own = [(i, g) for i, of, g in new if of == b]
        pages = x[[i for i, _ in own]]
        decided = channels_of(pages if alone else pages.transpose(0, 2), side, per_head)
        assert decided is not None
        if alone:
            channels[b, [g for _, g in own]] = decided[:, 0]
        elif not any(chosen[b]):
            channels[b] = decided[0, 0]


def check_directory(
    layout: Layout, data: Tensor, offset: Tensor, counts: Tensor, classes: Tensor | None, hot_len: Tensor, window: int
) -> None:
    """RuntimeError unless all records lie within ``data`` and no count is beyond its page or the hot window."""
    most = layout.page // layout.token_groups
    for name, x, limit in (("hot_len", hot_len, window), ("counts", counts, most)):
        odd = (x < 0) | (x > limit)
        if bool(odd.any()):
            raise RuntimeError(f"{name} must be within [0, {limit}], got {int(x[odd][0])}")
    each = counts.long()
    tokens = each.sum(-1)
    high = tokens
    if classes is not None:
        entry = torch.arange(layout.page, device=tokens.device)
        high = (unpack_bits(classes, layout.page) & (entry < tokens[..., None])).sum(-1)
    size = sum(layout.sizes(high, tokens - high, (each > 0).sum(-1)))
    odd = (tokens > 0) & ((offset < 0) | (offset % 16 != 0) | (offset > data.numel() - size))
    if bool(odd.any()):
        b, g, page = odd.nonzero()[0].tolist()
        raise RuntimeError(
            f"offset must be a multiple of 16 with the whole record within the {data.numel()} bytes of data; page "
            f"{page} of head {g} of sequence {b} is at {int(offset[b, g, page])}"
        )


def by_page(x: Tensor, order: Tensor) -> Tensor:
    """``x[B,G,pages,*]`` with its pages in another order ``[B,G,pages]``."""
    return x.gather(2, order[..., None].expand(*order.shape, x.shape[3]))


def compacted(
    layout: Layout, data: Tensor, offset: Tensor, counts: Tensor, classes: Tensor | None, stays: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``(data, offset, counts, classes)`` of the entries ``stays[B,G,pages,P]`` alone; some pages may be empty."""
    bounds = counts.long().cumsum(-1)
    upto = torch.nn.functional.pad(stays.long().cumsum(-1), (1, 0))
    kept = upto.gather(-1, bounds)
    new_counts = kept.diff(dim=-1, prepend=torch.zeros_like(kept[..., :1]))
    place = upto[..., 1:] - 1  # of an entry among the survivors of its page
    new_classes = None
    if classes is not None:
        high = unpack_bits(classes, layout.page)
        order = (~stays).to(torch.int8).argsort(dim=-1, stable=True)
        new_classes = pack_bits(high.gather(-1, order) & stays.gather(-1, order))
    size = Addresses.of(layout, torch.zeros_like(offset), new_counts, new_classes).size.flatten()
    ends = size.cumsum(0)
    new_offset = (ends - size).view_as(offset)
    new_data = records(int(ends[-1]) if len(ends) else 0, data.device).zero_()
    for begin in range(0, offset.shape[2], CHUNK):
        part = slice(begin, begin + CHUNK)
        old, new = (
            Addresses.of(layout, o[:, :, part], c[:, :, part], None if bits is None else bits[:, :, part])
            for o, c, bits in ((offset, counts, classes), (new_offset, new_counts, new_classes))
        )
        _move(data, old, new_data, new, stays[:, :, part], place[:, :, part].clamp(min=0))
    return new_data, new_offset, new_counts, new_classes


def _move(source: Tensor, old: Addresses, target: Tensor, new: Addresses, stays: Tensor, place: Tensor) -> None:
    """Copy the rows of the entries that stay, and the parameters that they use, to where they are now."""
    layout = old.layout
    for which, side in enumerate((layout.key, layout.value)):
        of_class = [(stays if old.high is None else stays & old.high, side.row_bytes())]
        if old.high is not None:
            of_class.append((stays & ~old.high, side.row_bytes(False)))
        for chosen, size in of_class:
            to = new.codes[which].gather(-1, place)[chosen]
            scatter_bytes(target, to, gather_bytes(source, old.codes[which][chosen], size))
        for start, end, array in zip(old.arrays[which], new.arrays[which], side.arrays, strict=True):
            users = stays
            if array.high is not None and old.high is not None:
                users = stays & (old.high == array.high)
            moved = gather_bytes(source, start[users], array.width * side.scale_bytes)
            scatter_bytes(target, end.gather(-1, place)[users], moved)
