"""Examples of selection. Scores and distances are exact in every dtype, so that picks are the same everywhere."""

import math

import torch
from torch import Tensor

from .registry import Arguments, example, odd_view, odd_width, signs


def integers(batch: int, n: int, nan: float = 0.0) -> Tensor:
    """Scores from -9 to 9 with a share of NaN."""
    scores = torch.randint(-9, 10, (batch, n)).float()
    return torch.where(torch.rand(batch, n) < nan, math.nan, scores)


def odd_rows(scores: Tensor) -> Tensor:
    """The values of ``scores[B,N]`` in the middle of NaN, every second element."""
    room = torch.full((scores.shape[0] + 1, 2 * scores.shape[1] + 3), math.nan, dtype=scores.dtype)
    view = room[1:, 3::2]
    view.copy_(scores)
    return view


# ---- top_tokens: scores, k, protect, mask, segments, by_score --------------------------------------------------------


@example("top_tokens", "small", "class token")
def _top_small(dtype: torch.dtype) -> Arguments:
    return torch.randn(2, 17).to(dtype), [5], 1, None, None, False


@example("top_tokens", "awkward", "strided, ties, NaN, masks too small, by score")
def _top_view(dtype: torch.dtype) -> Arguments:
    mask = torch.rand(3, 333) < torch.tensor([0.9, 0.5, 0.1])[:, None]
    return odd_rows(integers(3, 333, nan=0.1).to(dtype)), [150], 3, mask, None, True


@example("top_tokens", "awkward", "segments, some empty, some too short")
def _top_segments(dtype: torch.dtype) -> Arguments:
    segments = torch.randint(-1, 6, (2, 500))
    return integers(2, 500, nan=0.1).to(dtype), [40, 0, 200, 7, 60, 1, 3], 2, None, segments, False


@example("top_tokens", "awkward", "all equal")
def _top_equal(dtype: torch.dtype) -> Arguments:
    return torch.randint(0, 2, (2, 1)).expand(2, 1500).to(dtype), [700], 0, torch.rand(2, 1500) < 0.8, None, False


@example("top_tokens", "large", "(64,576), k=64")
def _top_images(dtype: torch.dtype) -> Arguments:
    return torch.randn(64, 576).to(dtype), [64], 0, None, None, False


@example("top_tokens", "large", "(1,65536), k=4096")
def _top_video(dtype: torch.dtype) -> Arguments:
    return torch.randn(1, 65536).to(dtype), [4096], 0, None, None, False


# ---- sample_cdf: scores, k, protect ----------------------------------------------------------------------------------


@example("sample_cdf", "small", "class token")
def _sample_small(dtype: torch.dtype) -> Arguments:
    return torch.rand(2, 17).to(dtype), 9, 1


@example("sample_cdf", "awkward", "strided, zeros, NaN, more heights than tokens")
def _sample_view(dtype: torch.dtype) -> Arguments:
    return odd_rows(integers(3, 333, nan=0.1).to(dtype)), 700, 2


@example("sample_cdf", "large", "(64,197), k=197")
def _sample_base(dtype: torch.dtype) -> Arguments:
    return torch.rand(64, 197).pow(4).to(dtype), 197, 1


# ---- density_peaks: x, k, neighbors ----------------------------------------------------------------------------------


@example("density_peaks", "small", "neighbors=3")
def _peaks_small(dtype: torch.dtype) -> Arguments:
    return signs(2, 17, 16).to(dtype), 4, 3


@example("density_peaks", "awkward", "odd view, NaN tokens, equal tokens")
def _peaks_view(dtype: torch.dtype) -> Arguments:
    x = odd_width(3, 131, 64)
    x[:, 90:110] = x[:, :20]
    x[torch.rand(3, 131) < 0.1] = math.nan
    return odd_view(x.to(dtype)), 40, 5


@example("density_peaks", "large", "(8,576,64), k=64, neighbors=5", flops=2 * 8 * 576**2 * 64)
def _peaks_large(dtype: torch.dtype) -> Arguments:
    return signs(8, 576, 64).to(dtype), 64, 5
