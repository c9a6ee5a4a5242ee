"""Examples of greedy k-center selection."""

import math

import torch

from .registry import Arguments, example, odd_view, signs

# ---- k_center: x, k, metric, objective, start, first, mask, candidates_scored ----------------------------------------


@example("k_center", "small", "isolated start, mask")
def _small(dtype: torch.dtype) -> Arguments:
    mask = torch.arange(40).remainder(7).gt(0).expand(2, 40)
    return torch.randn(2, 40, 24).to(dtype), 9, "cosine", "max_min", "isolated", None, mask, 0


@example("k_center", "awkward", "odd view, NaN tokens, ties, given start, summed distances")
def _sums(dtype: torch.dtype) -> Arguments:
    x = torch.where(torch.rand(2, 67, 1) < 0.1, math.nan, signs(2, 67, 33))
    return odd_view(x.to(dtype)), 60, "cosine", "max_sum", "given", torch.tensor([5, 66]), None, 0


@example("k_center", "awkward", "odd view, euclidean, longest first")
def _euclidean(dtype: torch.dtype) -> Arguments:
    return odd_view(torch.randn(2, 45, 37).to(dtype)), 20, "euclidean", "max_min", "norm", None, None, 0


@example("k_center", "awkward", "last dimension not contiguous, centres scored by threes", copies=True)
def _transposed(dtype: torch.dtype) -> Arguments:
    return torch.randn(1, 48, 130).to(dtype).mT, 31, "cosine", "max_min", "first", None, None, 3


@example("k_center", "large", "(1,576,1024), k=58", flops=2 * 576**2 * 1024)
def _image(dtype: torch.dtype) -> Arguments:
    return torch.randn(1, 576, 1024).to(dtype), 58, "cosine", "max_min", "isolated", None, None, 0


@example("k_center", "large", "(1,576,1024), k=58, longest first", flops=2 * 57 * 576 * 1024)
def _kept_tokens(dtype: torch.dtype) -> Arguments:
    return torch.randn(1, 576, 1024).to(dtype), 58, "cosine", "max_min", "norm", None, None, 0


@example("k_center", "large", "(2,4096,1024), k=32, sums from a token on", flops=2 * 2 * 31 * 4096 * 1024)
def _streamed_tokens(dtype: torch.dtype) -> Arguments:
    x = torch.randn(2, 4096, 1024).to(dtype)
    return x, 32, "cosine", "max_sum", "given", torch.tensor([5, 4095]), None, 0


@example("k_center", "large", "(16,576,1024), k=58", flops=2 * 16 * 576**2 * 1024)
def _images(dtype: torch.dtype) -> Arguments:
    return torch.randn(16, 576, 1024).to(dtype), 58, "cosine", "max_min", "isolated", None, None, 0
