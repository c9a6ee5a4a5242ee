"""Examples of merging."""

import math

import torch
from torch import Tensor

from ... import reference
from .registry import Arguments, example, odd_view, random_map

# ---- build_map: assign, n_out ----------------------------------------------------------------------------------------


@example("build_map", "small", "dropped tokens")
def _map_small(dtype: torch.dtype) -> Arguments:
    return random_map(3, 50, 20)[0], 20


@example("build_map", "awkward", "more slots than tokens")
def _map_sparse(dtype: torch.dtype) -> Arguments:
    return random_map(2, 131, 700)[0], 700


@example("build_map", "awkward", "more slots than shared memory holds")
def _map_many(dtype: torch.dtype) -> Arguments:
    return random_map(1, 3000, 70_000)[0], 70_000


@example("build_map", "large", "(8,4096) to 2048")
def _map_large(dtype: torch.dtype) -> Arguments:
    return random_map(8, 4096, 2048)[0], 2048


# ---- merge: x, assign, offsets, members, size, mode ------------------------------------------------------------------


@example("merge", "small", "mean, sizes")
def _merge_small(dtype: torch.dtype) -> Arguments:
    return torch.randn(2, 37, 24).to(dtype), *random_map(2, 37, 20), torch.randint(0, 4, (2, 37)).float(), "mean"


@example("merge", "awkward", "odd view, max, special values")
def _merge_max(dtype: torch.dtype) -> Arguments:
    special = torch.tensor([math.nan, math.inf, -math.inf, -0.0])[torch.randint(4, (3, 61, 67))]
    x = torch.where(torch.rand(3, 61, 67) < 0.1, special, torch.randn(3, 61, 67))
    return odd_view(x.to(dtype)), *random_map(3, 61, 30), None, "max"


@example("merge", "awkward", "odd view, sum into one slot")
def _merge_sum(dtype: torch.dtype) -> Arguments:
    assign = torch.zeros(2, 133, dtype=torch.int32)
    return odd_view(torch.randn(2, 133, 131).to(dtype)), assign, *reference.build_map(assign, 3), None, "sum"


@example("merge", "awkward", "first, last dimension not contiguous", copies=True)
def _merge_first(dtype: torch.dtype) -> Arguments:
    return torch.randn(2, 64, 41).to(dtype).mT, *random_map(2, 41, 12), None, "first"


@example("merge", "large", "(8,197,768) to 181, mean, sizes")
def _merge_base(dtype: torch.dtype) -> Arguments:
    return torch.randn(8, 197, 768).to(dtype), *random_map(8, 197, 181), torch.rand(8, 197), "mean"


@example("merge", "large", "(8,4096,1024) to 2048, sum")
def _merge_large(dtype: torch.dtype) -> Arguments:
    return torch.randn(8, 4096, 1024).to(dtype), *random_map(8, 4096, 2048), None, "sum"


# ---- merge_backward: grad_y, x, y, assign, offsets, members, size, size_out, mode ------------------------------------


def _backward(x: Tensor, n_out: int, size: Tensor | None, mode: str) -> Arguments:
    token_map = random_map(x.shape[0], x.shape[1], n_out)
    y, size_out = reference.merge(x, *token_map, size, mode)
    return torch.randn(y.shape).to(x.dtype), x, y, *token_map, size, size_out, mode


@example("merge_backward", "small", "mean, sizes")
def _backward_small(dtype: torch.dtype) -> Arguments:
    return _backward(torch.randn(2, 37, 24).to(dtype), 20, torch.randint(0, 4, (2, 37)).float(), "mean")


@example("merge_backward", "awkward", "odd view, max, ties")
def _backward_max(dtype: torch.dtype) -> Arguments:
    return _backward(odd_view(torch.randint(-2, 3, (3, 61, 67)).to(dtype)), 30, None, "max")


@example("merge_backward", "awkward", "first, odd width")
def _backward_first(dtype: torch.dtype) -> Arguments:
    return _backward(torch.randn(2, 41, 131).to(dtype), 12, None, "first")


@example("merge_backward", "large", "(8,4096,1024) to 2048, mean")
def _backward_large(dtype: torch.dtype) -> Arguments:
    return _backward(torch.randn(8, 4096, 1024).to(dtype), 2048, None, "mean")


# ---- unmerge: y, assign, offsets, members, residual ------------------------------------------------------------------


@example("unmerge", "small", "residual")
def _unmerge_small(dtype: torch.dtype) -> Arguments:
    return torch.randn(2, 20, 24).to(dtype), *random_map(2, 37, 20), torch.randn(2, 37, 24).to(dtype)


@example("unmerge", "awkward", "odd views, residual")
def _unmerge_view(dtype: torch.dtype) -> Arguments:
    y, residual = torch.randn(3, 30, 67), torch.randn(3, 61, 67)
    return odd_view(y.to(dtype)), *random_map(3, 61, 30), odd_view(residual.to(dtype))


@example("unmerge", "awkward", "one channel, no residual")
def _unmerge_narrow(dtype: torch.dtype) -> Arguments:
    return torch.randn(2, 12, 1).to(dtype), *random_map(2, 41, 12), None


@example("unmerge", "large", "2048 to (8,4096,1024)")
def _unmerge_large(dtype: torch.dtype) -> Arguments:
    return torch.randn(8, 2048, 1024).to(dtype), *random_map(8, 4096, 2048), None
