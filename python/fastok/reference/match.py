"""Specification of ``bipartite_match`` and ``nearest``: plain PyTorch, fp32 (fp64 for fp64 input), any device."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .merge import build_map

if TYPE_CHECKING:
    from ..token_map import TokenMap

Partition = str | tuple[Tensor, Tensor]

# Numbers that `nearest` holds at once per sample, so that its memory does not grow with N x M.
_CHUNK = 1 << 22


def unit(x: Tensor) -> Tensor:
    """Rows of ``x`` divided by max(norm, 1e-12), without overflow or underflow in the norm."""
    x = x if x.dtype == torch.float64 else x.float()
    peak = x.abs().amax(-1, keepdim=True)
    scale = torch.where((peak > 0) & peak.isfinite(), peak, 1)
    norm = (x / scale).norm(dim=-1, keepdim=True)
    tiny = (norm * scale < 1e-12) & peak.isfinite()
    return torch.where(tiny, x * 1e12, x / scale / norm)


def split(n: int, src: Tensor | None, dst: Tensor | None, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Source and destination positions as int64 ``[B,·]``; None means even positions and odd positions."""
    if src is None or dst is None:
        positions = torch.arange(n, device=device)
        src, dst = positions[0::2], positions[1::2]
    return src.long().expand(batch, src.shape[-1]), dst.long().expand(batch, dst.shape[-1])


def rank_of(*keys: Tensor) -> Tensor:
    """Place of each element of a row when sorted ascending by ``keys`` (most significant first), ties by index."""
    order = torch.arange(keys[0].shape[-1], device=keys[0].device).expand_as(keys[0])
    for key in reversed(keys):
        order = order.gather(-1, key.gather(-1, order).argsort(dim=-1, stable=True))
    return torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )


def match_map(
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

    With ``static_shape`` the number of slots is ``N - r`` whatever the data holds: sources without a score (NaN) are
    then merged last, into the lowest destination, rather than making the output larger.
    """
    batch, n, _ = metric.shape
    device = metric.device
    src, dst = split(n, src, dst, batch, device)
    n_src, n_dst = src.shape[1], dst.shape[1]
    if n_src == 0 or n_dst == 0 or r <= 0:
        assign = torch.arange(n, dtype=torch.int32, device=device).repeat(batch, 1)
        return assign, torch.full((batch,), n, dtype=torch.int32, device=device), *build_map(assign, n)

    # Each source's best destination.
    unit_rows = unit(metric)
    a = unit_rows.gather(1, src[..., None].expand(-1, -1, metric.shape[2]))
    b = unit_rows.gather(1, dst[..., None].expand(-1, -1, metric.shape[2]))
    similarity = (a @ b.mT).masked_fill((dst < protect)[:, None], math.nan)
    score, mate = similarity.nan_to_num(nan=-math.inf).max(-1)
    free = src >= protect

    # The r best sources above the threshold.
    key = score if bias is None else score + bias.to(score.dtype).gather(1, src)
    scored = free & (score > -math.inf) & ~key.isnan()
    eligible = scored if threshold is None else scored & (score > threshold)
    descending = torch.where(scored, -key, math.inf)
    merged = eligible & (rank_of((~eligible).int(), descending) < r)
    if static_shape and threshold is None:
        merged = free & (rank_of((~free).int(), (~scored).int(), descending) < r)
        mate = torch.where(scored, mate, (dst >= protect).int().argmax(-1, keepdim=True))

    # Number the heads (tokens that keep a slot), then give every merged source its destination's slot.
    position = torch.arange(n, device=device).expand(batch, n)
    kind = torch.zeros_like(position)  # 0 protected or in neither list, 1 kept source, 2 destination, 3 merged away
    kind = kind.scatter(1, dst, torch.where(dst >= protect, 2, 0))
    kind = kind.scatter(1, src, torch.where(merged, 3, torch.where(free, 1, 0)))
    target = dst.gather(1, mate)
    if sorted_order:
        lowest = position.scatter_reduce(1, target, torch.where(merged, src, n), "amin")
        slot = rank_of((kind == 3).int(), lowest)
    else:
        within = position.scatter(1, dst, torch.arange(n_dst, device=device).expand(batch, n_dst))
        if protect == 0:
            within = within.scatter(1, src, rank_of((~scored).int(), descending))
        else:
            within = within.scatter(1, src, src)
        slot = rank_of(kind, torch.where(kind == 0, position, within))
    slot = slot.scatter(1, src, torch.where(merged, slot.gather(1, target), slot.gather(1, src)))
    counts = n - merged.sum(-1)
    slot = torch.where((counts == n)[:, None], position, slot)
    if threshold is not None:
        n_out = n
    elif static_shape or batch == 0:
        n_out = n - r
    else:
        n_out = int(counts.max())
    assign = slot.int()
    return assign, counts.int(), *build_map(assign, n_out)


def bipartite_match(
    metric: Tensor,
    r: int,
    *,
    protect: int = 0,
    partition: Partition = "alternate",
    threshold: float | None = None,
    bias: Tensor | None = None,
    order: str = "tome",
) -> "TokenMap":
    """Specification of :func:`fastok.bipartite_match`, same arguments and result."""
    from ..token_map import TokenMap

    src, dst = (None, None) if isinstance(partition, str) else partition
    n = metric.shape[1]
    limit = max(n - protect, 0) // 2 if src is None else src.shape[-1]
    assign, counts, offsets, members = match_map(
        metric, min(r, limit), protect, threshold, bias, src, dst, order == "sorted", False
    )
    return TokenMap(assign, offsets.shape[1] - 1, counts, offsets, members)


def nearest(
    x: Tensor, y: Tensor, k: int = 1, *, similarity: str = "cosine", mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Specification of :func:`fastok.nearest`, same arguments and result."""
    return nearest_rows(x, y, k, similarity, mask)


def nearest_rows(x: Tensor, y: Tensor, k: int, similarity: str, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """``torch.ops.fastok.nearest``: the k best rows of ``y`` for each row of ``x``, ``(value, index)``."""
    if similarity == "cosine":
        x, y = unit(x), unit(y)
    elif x.dtype != torch.float64:
        x, y = x.float(), y.float()
    values, indices = [], []
    per_row = y.shape[1] * (y.shape[2] if similarity == "euclidean" else 1)
    for rows in x.split(max(1, _CHUNK // max(1, per_row)), dim=1):
        score = -(rows[:, :, None] - y[:, None]).square().sum(-1) if similarity == "euclidean" else rows @ y.mT
        if mask is not None:
            score = score.masked_fill(~mask[:, None], math.nan)
        score, index = torch.where(score.isnan(), -math.inf, score).sort(dim=-1, descending=True, stable=True)
        score, index = score[..., :k], index[..., :k]
        values.append(score)
        indices.append(torch.where(score == -math.inf, -1, index))
    if not values:
        return x.new_empty(x.shape[0], 0, k), torch.empty(x.shape[0], 0, k, dtype=torch.int64, device=x.device)
    return torch.cat(values, 1), torch.cat(indices, 1)
