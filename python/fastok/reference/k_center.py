"""Specification of ``k_center``: plain PyTorch in fp64, any device.

Distances are defined so that every backend gets the same bits, whatever order it sums in. For the cosine, tokens are
scaled by a power of two to a norm of at most 2^24 and rounded to integers: their dot products are integers below 2^53
and hence exact in fp64. For the Euclidean distance, squares are summed in fp64 over 32 lanes in a fixed order. Either
is rounded to fp32.
"""

import math

import torch
from torch import Tensor

# Numbers that the isolated start holds at once.
_CHUNK = 1 << 24
_LANES = 32
# What a norm is clamped at, and the largest power of two that a token is scaled by.
_LEAST_NORM, _MOST_EXPONENT = 1e-12, 63


def power_of_two(exponent: Tensor) -> Tensor:
    """2 to an integer power, as fp64, by its bits."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(q, norm, exponent)`` of tokens ``x[..., D]``: integers ``round(x 2^exponent)`` as fp64, norms of at most 2^24.

    ``norm`` is clamped like ``x``'s at 1e-12. Tokens that are not finite give zeros.
    """
    x = torch.where(x.isfinite().all(-1, keepdim=True), x.double(), 0)
    peak = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    peak_exponent = torch.frexp(peak).exponent
    # An upper bound of the norm that no order of summation changes: squares rounded up to multiples of 2^-24.
    bound = ((x * power_of_two(-peak_exponent)).square() * 2.0**24).ceil().sum(-1, keepdim=True)
    half = (torch.frexp(bound).exponent + 1) // 2
    exponent = (36 - half - peak_exponent).clamp(max=_MOST_EXPONENT)
    q = (x * power_of_two(exponent)).round()
    least = _LEAST_NORM * power_of_two(exponent)
    norm = q.square().sum(-1, keepdim=True).sqrt()
    return q, torch.maximum(norm, least)[..., 0], exponent[..., 0]


def cosine(a: Tensor, norm_a: Tensor, b: Tensor, norm_b: Tensor) -> Tensor:
    """fp32 cosines ``[..., M, N]`` of quantized tokens ``a[..., M, D]`` and ``b[..., N, D]``."""
    return ((a @ b.mT) / (norm_a[..., :, None] * norm_b[..., None, :])).float()


def euclidean(a: Tensor, b: Tensor) -> Tensor:
    """fp32 distances ``[..., M, N]`` of tokens ``a[..., M, D]`` and ``b[..., N, D]``."""
    a, b = (torch.nn.functional.pad(x.double(), (0, -x.shape[-1] % _LANES)) for x in (a, b))
    lanes = a.new_zeros(*a.shape[:-1], b.shape[-2], _LANES)
    for d in range(0, a.shape[-1], _LANES):
        lanes = lanes + (a[..., :, None, d : d + _LANES] - b[..., None, :, d : d + _LANES]).square()
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0].sqrt().float()


class Tokens:
    """Tokens prepared for distances."""

    def __init__(self, x: Tensor, metric: str) -> None:
        """``x[B,N,D]``; values of tokens that are not finite are not looked at."""
        self.x = torch.where(x.isfinite().all(-1, keepdim=True), x, 0)
        self.metric = metric
        self.q, self.norm, self.exponent = quantize(x)

    def distances(self, index: Tensor) -> Tensor:
        """Of tokens ``index[B,M]`` to all: fp32 ``[B,M,N]``."""
        at = index[..., None]
        if self.metric == "euclidean":
            return euclidean(self.x.gather(1, at.expand(-1, -1, self.x.shape[2])), self.x)
        rows = self.q.gather(1, at.expand(-1, -1, self.q.shape[2]))
        return 1 - cosine(rows, self.norm.gather(1, index), self.q, self.norm)

    def lengths(self) -> Tensor:
        """fp64 norms ``[B,N]``."""
        return self.q.square().sum(-1).sqrt() * power_of_two(-self.exponent)

    def isolation(self, candidate: Tensor) -> Tensor:
        """Each token's distance to the nearest other candidate, fp32 ``[B,N]``; inf where there is none."""
        batch, n, _ = self.x.shape
        nearest = torch.full((batch, n), math.inf, device=self.x.device)
        position = torch.arange(n, device=self.x.device)
        per_row = max(1, batch * n * (_LANES if self.metric == "euclidean" else 1))
        for rows in position.split(max(1, _CHUNK // per_row)):
            distance = self.distances(rows.expand(batch, -1))
            distance = distance.masked_fill(~candidate[:, None] | (rows[:, None] == position), math.inf)
            nearest[:, rows] = distance.amin(-1)
        return nearest


def k_center_picks(
    x: Tensor,
    k: int,
    metric: str,
    objective: str,
    start: str,
    first: Tensor | None,
    mask: Tensor | None,
    candidates_scored: int,
) -> tuple[Tensor, Tensor]:
    """``torch.ops.fastok.k_center``: ``(index, distance)``; past the available tokens -1 and -inf.

    ``start`` is ``"isolated"``, ``"norm"``, ``"first"``, or ``"given"`` with ``first`` int64 ``[B]`` (a token that is
    not available gives way to the lowest that is). ``candidates_scored`` changes nothing here.
    """
    batch, n, _ = x.shape
    index = torch.full((batch, k), -1, dtype=torch.int64, device=x.device)
    distance = torch.full((batch, k), -math.inf, device=x.device)
    if batch == 0 or n == 0:
        return index, distance
    position = torch.arange(n, device=x.device)
    unpicked = torch.ones(batch, n, dtype=torch.bool, device=x.device) if mask is None else mask.clone()
    finite = x.isfinite().all(-1)
    tokens = Tokens(x, metric)
    value = torch.full((batch, n), math.inf, dtype=torch.float64, device=x.device)
    for step in range(k):
        rank, shown = value, value
        if step == 0 and start == "isolated":
            rank = shown = tokens.isolation(unpicked & finite).double()
        elif step == 0 and start == "norm":
            rank = tokens.lengths()
        elif step == 0 and first is not None:
            rank = (position == first[:, None]).double()
        # Finite tokens by rank, then the others by index.
        candidate = unpicked & finite
        rank = rank.masked_fill(~candidate, -math.inf)
        best = torch.where(candidate.any(1), (rank == rank.amax(1, keepdim=True)).int().argmax(1), -1)
        pick = torch.where(best >= 0, best, torch.where(unpicked.any(1), unpicked.int().argmax(1), -1))
        index[:, step] = pick
        at = pick.clamp(min=0)[:, None]
        shown = shown.gather(1, at)[:, 0].masked_fill(best < 0, math.nan)
        distance[:, step] = shown.masked_fill(pick < 0, -math.inf).float()
        unpicked = unpicked & (position != pick[:, None])
        to_pick = tokens.distances(at)[:, 0].double()
        earlier = value if step > 0 or objective == "max_min" else torch.zeros_like(value)
        value = torch.minimum(earlier, to_pick) if objective == "max_min" else earlier + to_pick
    return index, distance


def k_center(
    x: Tensor,
    k: int,
    *,
    metric: str = "cosine",
    objective: str = "max_min",
    start: "str | int | Tensor" = "isolated",
    mask: Tensor | None = None,
    candidates_scored: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Specification of :func:`fastok.k_center`, same arguments and result."""
    first = None
    if not isinstance(start, str):
        first = torch.as_tensor(start, device=x.device).expand(x.shape[0])
        start = "given"
    return k_center_picks(x, k, metric, objective, start, first, mask, candidates_scored or 0)
