"""Examples of greedy facility location."""

import math

import torch

from .registry import Arguments, example, odd_view, signs

# ---- max_coverage: similarity, y, x, k, modular ----------------------------------------------------------------------


@example("max_coverage", "small", "matrix, modular term")
def _small(dtype: torch.dtype) -> Arguments:
    return torch.randn(2, 20, 31).to(dtype), None, None, 9, torch.rand(2, 31)


@example("max_coverage", "awkward", "matrix in an odd view, ties, NaN")
def _matrix(dtype: torch.dtype) -> Arguments:
    similarity = torch.where(torch.rand(2, 45, 67) < 0.002, math.nan, torch.randint(-2, 5, (2, 45, 67)) / 4)
    return odd_view(similarity.to(dtype)), None, None, 67, None


@example("max_coverage", "awkward", "pair in odd views, NaN tokens")
def _pair(dtype: torch.dtype) -> Arguments:
    x = torch.where(torch.rand(2, 45, 1) < 0.1, math.nan, torch.randn(2, 45, 37))
    return None, odd_view(signs(2, 30, 37).to(dtype)), odd_view(x.to(dtype)), 20, torch.rand(2, 45)


@example("max_coverage", "large", "(1,576,1024) by itself, k=64", flops=2 * 576**2 * 1024)
def _image(dtype: torch.dtype) -> Arguments:
    x = torch.randn(1, 576, 1024).to(dtype)
    return None, x, x, 64, None


@example("max_coverage", "large", "matrix (5,620,576), k=64")
def _crops(dtype: torch.dtype) -> Arguments:
    return (5 * torch.randn(5, 620, 576)).softmax(-1).to(dtype), None, None, 64, None
