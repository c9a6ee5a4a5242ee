"""Selection as one writes it in PyTorch."""

import math

import torch
from torch import Tensor


def top_tokens(scores: Tensor, k: int) -> Tensor:
    return scores.topk(k, dim=1).indices.sort(dim=1).values


def sample_cdf(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Token of each slot, and which slots are used. The nearest rank is found among all, as published."""
    value, token = scores.sort(dim=1)
    level = value.cumsum(1)
    level = (level - level[:, :1]) / (level[:, -1:] - level[:, :1])
    low = torch.where(level > 0, level, 1).amin(1, keepdim=True)
    height = low + (1 - low) * torch.linspace(0, 1, k, device=scores.device)
    rank = (level[:, None] - height[..., None]).abs().argmin(-1)
    used = torch.ones_like(rank, dtype=torch.bool)
    used[:, 1:] = rank[:, 1:] != rank[:, :-1]
    return token.gather(1, rank), used


def density_peaks(x: Tensor, k: int, neighbors: int) -> Tensor:
    distance = torch.cdist(x, x) / math.sqrt(x.shape[-1])
    nearest = distance.topk(neighbors, dim=-1, largest=False).values
    density = (-nearest.square().mean(-1)).exp()
    denser = density[:, None, :] > density[:, :, None]
    farthest = distance.flatten(1).amax(1)[:, None, None]
    separation = torch.where(denser, distance, farthest).amin(-1)
    return (density * separation).topk(k, dim=-1).indices
