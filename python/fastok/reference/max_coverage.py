"""Specification of ``max_coverage``: plain PyTorch in fp64, any device.

Gains are defined so that every backend gets the same bits, whatever order it sums in: similarities become multiples of
a power of two of which R sums stay below 2^53. A pair is compared by ``k_center``'s cosine.
"""

import math

import torch
from torch import Tensor

from .k_center import cosine, power_of_two, quantize


def similarities(y: Tensor, x: Tensor) -> Tensor:
    """fp32 cosines ``[B,R,N]`` of ``y[B,R,D]`` and ``x[B,N,D]``, NaN where a token is not finite."""
    values = cosine(*quantize(y)[:2], *quantize(x)[:2])
    finite = y.isfinite().all(-1)[:, :, None] & x.isfinite().all(-1)[:, None]
    return torch.where(finite, values, math.nan)


def coverage_exponent(similarity: Tensor) -> Tensor:
    """``[B]``: similarities are counted in units of 2^-exponent, so fine that R of the largest stay below 2^53."""
    rows = similarity.shape[1]
    finite = torch.where(similarity.isfinite(), similarity.double(), 0).clamp(min=0)
    peak = finite.flatten(1).amax(1) if finite[0].numel() else finite.new_zeros(len(finite))
    return (52 - max(rows - 1, 0).bit_length() - torch.frexp(peak).exponent).clamp(max=200)


def max_coverage_matrix(similarity: Tensor, k: int, modular: Tensor | None) -> tuple[Tensor, Tensor]:
    """``torch.ops.fastok.max_coverage`` on a matrix ``[B,R,N]``: ``(index, gain)``."""
    batch, _, n = similarity.shape
    index = torch.empty(batch, k, dtype=torch.int64, device=similarity.device)
    gain = torch.empty(batch, k, device=similarity.device)
    if batch == 0:
        return index, gain
    exponent = coverage_exponent(similarity)[:, None]
    counted = (similarity.double() * power_of_two(exponent)[..., None]).round()
    covered = counted.new_zeros(similarity.shape[:2])
    unpicked = torch.ones(batch, n, dtype=torch.bool, device=similarity.device)
    for step in range(k):
        # Where it is no more than what is covered, infinities included, a token gains nothing.
        gained = torch.where(counted <= covered[..., None], 0, counted - covered[..., None]).sum(1)
        total = gained * power_of_two(-exponent)
        if modular is not None:
            # -inf stays that, whatever is gained.
            total = torch.where((modular == -math.inf) & ~total.isnan(), -math.inf, total + modular.double())
        candidate = unpicked & ~total.isnan()
        rank = total.masked_fill(~candidate, -math.inf)
        # -inf is a number too: it loses to all others, but not to NaN.
        best = (candidate & (rank == rank.amax(1, keepdim=True))).int().argmax(1)
        pick = torch.where(candidate.any(1), best, unpicked.int().argmax(1))
        index[:, step] = pick
        gain[:, step] = total.gather(1, pick[:, None])[:, 0].float()
        unpicked = unpicked.scatter(1, pick[:, None], False)
        picked = counted.gather(2, pick[:, None, None].expand(-1, counted.shape[1], 1))[..., 0]
        covered = torch.where(picked > covered, picked, covered)
    return index, gain


def max_coverage_picks(
    similarity: Tensor | None, y: Tensor | None, x: Tensor | None, k: int, modular: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``torch.ops.fastok.max_coverage``: on ``similarity``, or on the cosines of ``y`` and ``x``."""
    if similarity is None:
        assert y is not None
        assert x is not None
        similarity = similarities(y, x)
    return max_coverage_matrix(similarity, k, modular)


def max_coverage(
    similarity: "Tensor | tuple[Tensor, Tensor]", k: int, *, modular: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Specification of :func:`fastok.max_coverage`, same arguments and result."""
    if isinstance(similarity, Tensor):
        return max_coverage_picks(similarity, None, None, k, modular)
    return max_coverage_picks(None, *similarity, k, modular)
