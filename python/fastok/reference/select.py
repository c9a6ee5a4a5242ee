"""Specification of ``top_tokens``, ``sample_cdf``, ``density_peaks``: plain PyTorch, any device, no host wait."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .match import rank_of
from .merge import build_map

if TYPE_CHECKING:
    from ..token_map import TokenMap

_LARGEST = torch.finfo(torch.float32).max

# Numbers that `peak_rows` holds at once per sample, so that its memory does not grow with N x N.
_CHUNK = 1 << 22


def top_rows(
    scores: Tensor, k: Sequence[int], protect: int, mask: Tensor | None, segments: Tensor | None, by_score: bool
) -> Tensor:
    """``torch.ops.fastok.top_tokens``: int64 ``[B, protect + sum(k)]``; ``k`` has one budget per segment."""
    batch, n = scores.shape
    device = scores.device
    position = torch.arange(n, device=device).expand(batch, n)
    protected = position < protect
    segment = torch.zeros_like(position) if segments is None else segments
    allowed = (segment >= 0) & (segment < len(k)) & ~protected
    if mask is not None:
        allowed = allowed & mask
    descending = -(scores if scores.dtype == torch.float64 else scores.float())
    available = allowed & ~descending.isnan()
    group = torch.where(available, 0, torch.where(allowed, 1, 2))
    descending = torch.where(group == 1, math.inf, torch.where(group == 2, 0, descending))

    # Each segment's best, up to its budget. Tokens that cannot be chosen form a segment behind the others.
    segment = torch.where(available, segment, len(k))
    place = rank_of(segment, descending)
    length = torch.zeros(batch, len(k) + 1, dtype=torch.int64, device=device)
    length.scatter_add_(1, segment, torch.ones_like(segment))
    first = (length.cumsum(1) - length).gather(1, segment)
    budget = torch.tensor([*k, 0], device=device).expand(batch, -1).gather(1, segment)
    chosen = place - first < budget

    # What budgets could not be spent on goes to the best of the others.
    kept = rank_of((~protected).int(), (~chosen).int(), group, descending) < protect + sum(k)
    order = [(~kept).int(), (~protected).int()]
    order += [group, descending] if by_score else []
    place = rank_of(*order, position)
    return torch.empty_like(position).scatter_(1, place, position)[:, : protect + sum(k)].contiguous()


def top_tokens(
    scores: Tensor,
    k: int | Sequence[int] | Tensor,
    *,
    protect: int = 0,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    order: str = "index",
) -> Tensor:
    """Specification of :func:`fastok.top_tokens`, same arguments and result."""
    budgets = [k] if isinstance(k, int) else [int(budget) for budget in k]
    return top_rows(scores, budgets, protect, mask, segments, order == "score")


def prefix_sums(x: Tensor) -> Tensor:
    """Inclusive sums over the last dimension by doubling, which adds in the same order on every device."""
    step = 1
    while step < x.shape[-1]:
        x = torch.cat([x[..., :step], x[..., step:] + x[..., :-step]], -1)
        step *= 2
    return x


def sample_map(scores: Tensor, k: int, protect: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``torch.ops.fastok.sample_cdf``: the map as ``(assign, counts, offsets, members)``. All sums are in fp64."""
    batch, n = scores.shape
    device = scores.device
    n_out, n_free, heights = min(k, n), n - protect, k - protect
    assign = torch.arange(n, device=device).where(torch.arange(n, device=device) < protect, -1).repeat(batch, 1)
    counts = torch.full((batch,), protect, dtype=torch.int32, device=device)
    if n_free > 0 and heights > 0:
        # Ranks by ascending score; NaN comes first and is nothing.
        score = scores[:, protect:].double()
        score = torch.where(score.isnan(), -1, score.clamp(0, _LARGEST))
        score, token = score.sort(dim=1, stable=True)
        nothing = (score < 0).sum(1, keepdim=True).clamp(max=n_free - 1)
        rank = torch.arange(n_free, device=device).expand(batch, n_free)
        real = score >= 0

        # The cumulative distribution above its least value, not scaled. Where all scores are 0 they are equal.
        total = prefix_sums(score.clamp(min=0))
        total = torch.where(real, total - total.gather(1, nothing), 0)
        total = torch.where(total[:, -1:] == 0, torch.where(real, rank - nothing, 0).double(), total)

        # Evenly spaced heights from its least positive value to its largest. They ascend, and so do the ranks that they
        # are nearest to: each rank has those from the first that is nearer to it than to the rank before, found by
        # bisection, up to the next rank's first.
        high = total[:, -1:]
        low = torch.where(total > 0, total, high).amin(1, keepdim=True)
        before = torch.where(rank > nothing, total.roll(1, 1), -math.inf)
        first, end = torch.zeros_like(rank), torch.full_like(rank, heights)
        for _ in range(heights.bit_length()):
            middle = first + (end - first) // 2
            height = low + (high - low) * middle / max(heights - 1, 1)
            reaches = height - before > total - height
            first = torch.where(reaches | (first == end), first, middle + 1)
            end = torch.where(reaches, middle, end)
        next_first = torch.nn.functional.pad(first[:, 1:], (0, 1), value=heights)
        picked = (first < next_first) & real

        slot = torch.where(picked, protect + picked.cumsum(1) - 1, -1)
        assign = torch.cat([assign[:, :protect], torch.empty_like(slot).scatter_(1, token, slot)], 1)
        counts = counts + picked.sum(1, dtype=torch.int32)
    assign = assign.int()
    return assign, counts, *build_map(assign, n_out)


def sample_cdf(scores: Tensor, k: int, *, protect: int = 0) -> "TokenMap":
    """Specification of :func:`fastok.sample_cdf`, same arguments and result."""
    from ..token_map import TokenMap

    assign, counts, offsets, members = sample_map(scores, k, protect)
    return TokenMap(assign, offsets.shape[1] - 1, counts, offsets, members)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """``[B,n,m]`` from ``[B,n,D]`` and ``[B,m,D]``: 16 interleaved sums, added in pairs, the same on every device."""
    x, y = (torch.nn.functional.pad(rows, (0, -rows.shape[-1] % 16)) for rows in (x, y))
    terms = (x[:, :, None] - y[:, None]).square().unflatten(-1, (-1, 16))
    total = terms.new_zeros(*terms.shape[:3], 16)
    for term in terms.unbind(3):
        total = total + term
    for half in (8, 4, 2, 1):
        total = total[..., :half] + total[..., half:]
    return total[..., 0]


def peak_rows(x: Tensor, k: int, neighbors: int) -> Tensor:
    """``torch.ops.fastok.density_peaks``: int64 ``[B,k]``, best first."""
    batch, n, width = x.shape
    if batch * n == 0:
        return torch.empty(batch, k, dtype=torch.int64, device=x.device)
    x = x if x.dtype == torch.float64 else x.float()
    chunks = x.split(max(1, _CHUNK // max(1, n * width)), dim=1)

    # Density falls with the mean squared distance to the nearest neighbours, as far as there are any.
    nearest = torch.cat([_finite(squared_distances(rows, x)).sort(2).values[..., :neighbors] for rows in chunks], 1)
    near = nearest < math.inf
    count = near.sum(-1)
    spread = torch.where(near, nearest, 0).double().cumsum(-1)[..., -1] / (count * max(width, 1))
    spread = torch.where(count > 0, spread, math.inf)
    density = rank_of(spread)  # 0 is the densest; of equals, the token that comes first

    # Squared distance to the nearest denser token; of the densest token, to the farthest.
    separation = []
    for rows, own in zip(chunks, density.split(chunks[0].shape[1], dim=1), strict=True):
        squared = _finite(squared_distances(rows, x))
        denser = torch.where(density[:, None] < own[..., None], squared, math.inf).amin(-1)
        farthest = torch.where(squared < math.inf, squared, 0).amax(-1)
        separation.append(torch.where(denser < math.inf, denser, farthest))

    # log(density * distance), up to a constant: the product itself vanishes for distant neighbours.
    score = (torch.cat(separation, 1).double().log() / 2 - spread).to(x.dtype)
    return top_rows(torch.where(count > 0, score, math.nan), [k], 0, None, None, True)


def _finite(distances: Tensor) -> Tensor:
    """Infinity for what is not a number either."""
    return torch.where(distances < math.inf, distances, math.inf)


def density_peaks(x: Tensor, k: int, *, neighbors: int) -> Tensor:
    """Specification of :func:`fastok.density_peaks`, same arguments and result."""
    return peak_rows(x, k, neighbors)
