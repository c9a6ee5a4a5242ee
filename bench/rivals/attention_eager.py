"""Attention and what it attended to as users get both today: the softmax matrix in memory."""

import torch
from torch import Tensor


def attention_with_column_sums(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """``q[B,S,H,D]``, ``k, v[B,T,G,D]``: the output, and the head mean of the columns' sums."""
    heads, groups = q.shape[2], k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if heads != groups:
        k, v = (x.repeat_interleave(heads // groups, 1) for x in (k, v))
    logits = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        seen = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
        logits = logits.masked_fill(~seen, -torch.inf)
    weights = logits.softmax(-1)
    return (weights @ v).transpose(1, 2), weights.float().mean(1).sum(1)
