"""Examples of matching."""

import math

import torch

from .registry import Arguments, example, odd_view, odd_width, signs

# ---- bipartite_match: metric, r, protect, threshold, bias, src, dst, sorted_order, static_shape ----------------------


@example("bipartite_match", "small", "class token")
def _match_small(dtype: torch.dtype) -> Arguments:
    return signs(2, 17, 16).to(dtype), 4, 1, None, None, None, None, False, True


@example("bipartite_match", "awkward", "odd view, bias, NaN tokens, sorted")
def _match_view(dtype: torch.dtype) -> Arguments:
    metric = torch.where(torch.rand(3, 131, 1) < 0.1, math.nan, odd_width(3, 131, 64))
    bias = torch.randint(-2, 3, (3, 131)).float()
    return odd_view(metric.to(dtype)), 40, 2, None, bias, None, None, True, True


@example("bipartite_match", "awkward", "pairs of each sample, threshold")
def _match_pairs(dtype: torch.dtype) -> Arguments:
    order = torch.stack([torch.randperm(90) for _ in range(2)])
    return signs(2, 90, 16).to(dtype), 30, 1, 0.1, None, order[:, :40], order[:, 40:85], False, True


@example("bipartite_match", "awkward", "wide, last dimension not contiguous", copies=True)
def _match_wide(dtype: torch.dtype) -> Arguments:
    return signs(1, 1024, 150).to(dtype).mT, 70, 0, None, None, None, None, False, True


@example("bipartite_match", "awkward", "too many tokens for one block")
def _match_many(dtype: torch.dtype) -> Arguments:
    return signs(1, 4200, 16).to(dtype), 2000, 1, None, None, None, None, False, True


@example("bipartite_match", "large", "(8,197,64), r=16", flops=2 * 8 * 99 * 98 * 64)
def _match_base(dtype: torch.dtype) -> Arguments:
    return signs(8, 197, 64).to(dtype), 16, 1, None, None, None, None, False, True


@example("bipartite_match", "large", "(1,4096,256), r=2048", flops=2 * 2048**2 * 256)
def _match_image(dtype: torch.dtype) -> Arguments:
    return signs(1, 4096, 256).to(dtype), 2048, 0, None, None, None, None, False, True


# ---- nearest: x, y, k, similarity, mask ------------------------------------------------------------------------------


@example("nearest", "small", "cosine, k=1")
def _nearest_small(dtype: torch.dtype) -> Arguments:
    return signs(2, 7, 16).to(dtype), signs(2, 9, 16).to(dtype), 1, "cosine", None


@example("nearest", "awkward", "odd views, euclidean, k=5, a sample without candidates")
def _nearest_list(dtype: torch.dtype) -> Arguments:
    mask = torch.rand(2, 133) < 0.7
    mask[1] = False
    return odd_view(odd_width(2, 70, 64).to(dtype)), odd_view(odd_width(2, 133, 64).to(dtype)), 5, "euclidean", mask


@example("nearest", "awkward", "odd views, dot, k=1, NaN tokens")
def _nearest_dot(dtype: torch.dtype) -> Arguments:
    y = torch.where(torch.rand(2, 140, 1) < 0.1, math.nan, odd_width(2, 140, 256))
    return odd_view(odd_width(2, 66, 256).to(dtype)), odd_view(y.to(dtype)), 1, "dot", None


@example("nearest", "large", "(4,2048,64) in as many, cosine, k=1", flops=2 * 4 * 2048**2 * 64)
def _nearest_large(dtype: torch.dtype) -> Arguments:
    return signs(4, 2048, 64).to(dtype), signs(4, 2048, 64).to(dtype), 1, "cosine", None


@example("nearest", "large", "(4,1024,64) in as many, euclidean, k=8", flops=2 * 4 * 1024**2 * 64)
def _nearest_large_list(dtype: torch.dtype) -> Arguments:
    return signs(4, 1024, 64).to(dtype), signs(4, 1024, 64).to(dtype), 8, "euclidean", None
