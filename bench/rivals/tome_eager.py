"""Token merging as its formula reads in PyTorch (spec_vit §1): what a user runs without kernels."""

import torch
from torch import Tensor


def match_and_merge(metric: Tensor, x: Tensor, size: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """``metric[B,N,D]``, ``x[B,N,C]``, ``size[B,N,1]`` in one dtype; the class token (index 0) is kept."""
    with torch.no_grad():
        unit = metric / metric.norm(dim=-1, keepdim=True)
        scores = unit[:, 0::2] @ unit[:, 1::2].mT
        scores[:, 0] = -torch.inf
        best, mate = scores.max(dim=-1)
        order = best.argsort(dim=-1, descending=True)
        merged, kept = order[:, :r], order[:, r:].sort(dim=-1).values
        target = mate.gather(1, merged)

    def total(values: Tensor) -> Tensor:
        sources, destinations = values[:, 0::2], values[:, 1::2]
        width = values.shape[-1]
        moved = sources.gather(1, merged[..., None].expand(-1, -1, width))
        summed = destinations.scatter_add(1, target[..., None].expand(-1, -1, width), moved)
        return torch.cat([sources.gather(1, kept[..., None].expand(-1, -1, width)), summed], dim=1)

    new_size = total(size)
    return total(x * size) / new_size, new_size
