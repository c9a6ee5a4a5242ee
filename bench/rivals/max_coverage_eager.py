"""Greedy facility location as users write it in PyTorch: every gain in every step."""

import torch
from torch import Tensor


def greedy(y: Tensor, x: Tensor, k: int) -> Tensor:
    """``y[B,R,D]``, ``x[B,N,D]``, compared by cosine; tokens picked ``[B,k]``."""
    similarity = torch.nn.functional.normalize(y, dim=-1) @ torch.nn.functional.normalize(x, dim=-1).mT
    covered = torch.zeros(*y.shape[:2], 1, device=x.device, dtype=x.dtype)
    taken = torch.zeros(x.shape[:2], device=x.device, dtype=x.dtype)
    index = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    for step in range(k):
        pick = ((similarity - covered).clamp(min=0).sum(1) + taken).argmax(1)
        index[:, step] = pick
        taken.scatter_(1, pick[:, None], -torch.inf)
        column = similarity.gather(2, pick[:, None, None].expand(-1, y.shape[1], 1))
        covered = torch.maximum(covered, column)
    return index
