"""Greedy k-center selection as users write it in PyTorch: the matrix of all distances, or rows of it in chunks."""

import torch
from torch import Tensor


def gram_greedy(x: Tensor, k: int) -> Tensor:
    """``x[B,N,D]``, cosine, isolated start, by the N x N matrix; tokens picked ``[B,k]``."""
    unit = torch.nn.functional.normalize(x, dim=-1)
    distance = 1 - unit @ unit.mT
    index = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    pick = distance.topk(2, dim=-1, largest=False).values[..., 1].argmax(1)
    nearest = torch.full(x.shape[:2], torch.inf, device=x.device)
    samples = torch.arange(len(x), device=x.device)
    for step in range(k):
        index[:, step] = pick
        nearest = torch.minimum(nearest, distance[samples, pick])
        nearest[samples, pick] = -1
        pick = nearest.argmax(1)
    return index


def chunked_greedy(x: Tensor, k: int, rows: int = 2048) -> Tensor:
    """The same without the matrix in memory: ``rows`` of it at a time for the start, then a product per pick."""
    unit = torch.nn.functional.normalize(x, dim=-1)
    isolation = torch.empty(x.shape[:2], device=x.device)
    for begin in range(0, x.shape[1], rows):
        similarity = unit[:, begin : begin + rows] @ unit.mT
        similarity.diagonal(begin, 1, 2).fill_(-torch.inf)
        isolation[:, begin : begin + rows] = -similarity.amax(-1)
    pick = isolation.argmax(1)
    index = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    nearest = torch.full(x.shape[:2], torch.inf, device=x.device)
    samples = torch.arange(len(x), device=x.device)
    for step in range(k):
        index[:, step] = pick
        nearest = torch.minimum(nearest, 1 - (unit @ unit[samples, pick][..., None])[..., 0])
        nearest[samples, pick] = -1
        pick = nearest.argmax(1)
    return index
