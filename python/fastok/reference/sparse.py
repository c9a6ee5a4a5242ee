"""Specifications of sparse decode: channel calibration, label scores, token selection."""

import math

import torch
from torch import Tensor


def channel_statistic(q: Tensor, k: Tensor, statistic: str) -> Tensor:
    """fp64 sums over batch and tokens, ``[H,D]`` (``[G,D]`` for ``"k"``): |q|, |k|, or |q * k| of each token."""
    if statistic == "q":
        product = q.double()
    elif statistic == "k":
        product = k.double()
    else:
        product = q.double() * k.double().repeat_interleave(q.shape[2] // k.shape[2], 2)
    return product.abs().flatten(0, 1).sum(0)


def calibrate_channels(q: Tensor, k: Tensor, r: int, *, statistic: str = "qk") -> Tensor:
    """Specification of :func:`fastok.sparse.calibrate_channels`, same arguments and result."""
    return heaviest(channel_statistic(q, k, statistic), r)


def heaviest(statistic: Tensor, r: int) -> Tensor:
    """int64 ``[…,r]``: the channels with the largest statistic, heaviest first, ties to the lowest."""
    ranked = torch.where(statistic.isnan(), -math.inf, statistic).sort(dim=-1, descending=True, stable=True)
    return ranked.indices[..., :r]


def unpacked_labels(data: Tensor, scale: Tensor | None, r: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Labels ``[B,L,r,T]`` of what a `LabelCache` stores: 4-bit codes are two in a byte."""
    if data.dtype == torch.uint8:
        data = torch.cat([data & 15, data >> 4], 2)[:, :, :r].int() - 8
    labels = data.to(dtype)
    return labels if scale is None else labels * scale.to(dtype)[:, :, None]


def label_scores(
    q: Tensor, data: Tensor, scale: Tensor | None, channels: Tensor, kv_heads: int, shared: bool,
    seq_lens: Tensor | None,
) -> Tensor:  # fmt: skip
    """``torch.ops.fastok.label_scores``: partial dot products of ``q[B,S,H,D]`` with labels ``[B,L,…,T]``.

    fp32 ``[B,G,T]`` (``shared``: the largest of a group's query heads) or ``[B,H,T]``; the largest of the S rows; NaN
    where a product is. Tokens from ``seq_lens[B]`` on get -inf.
    """
    heads = q.shape[2]
    own = channels.repeat_interleave(heads // channels.shape[0], 0)
    dtype = torch.promote_types(q.dtype, torch.float32)
    labels = unpacked_labels(data, scale, channels.shape[1], dtype)
    labels = labels.repeat_interleave(heads // labels.shape[1], 1)
    picked = q.gather(3, own.expand(*q.shape[:2], *own.shape)).to(labels.dtype)
    scores = (picked.transpose(1, 2) @ labels).amax(2)
    if shared:
        scores = scores.unflatten(1, (kv_heads, -1)).amax(2)
    if seq_lens is not None:
        beyond = torch.arange(scores.shape[2], device=q.device) >= seq_lens[:, None]
        scores = scores.masked_fill(beyond[:, None], -math.inf)
    return scores


def select_tokens(
    scores: Tensor, k: int, mass: float | None, sink: int, recent: int, seq_lens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``torch.ops.fastok.select_tokens``: of ``scores[B,G,T]``, int64 ``[B,G,K]`` ascending, -1 padded, and counts.

    K is min(k, T). First come the ``sink`` first and ``recent`` last tokens of a sequence, then the best scores (ties
    to the lowest index, NaN last). With ``mass``, no more of them than needed to reach that share of the sum.
    """
    n = scores.shape[-1]
    k = min(k, n)
    position = torch.arange(n, device=scores.device)
    length = torch.full((scores.shape[0],), n, device=scores.device) if seq_lens is None else seq_lens
    length = length[:, None, None]
    there = (position < length).expand(scores.shape)
    forced = there & ((position < sink) | (position >= length - recent))
    value = torch.where(scores.isnan(), -math.inf, scores)
    first = value.sort(dim=-1, descending=True, stable=True).indices
    group = torch.where(forced, 0, torch.where(there, 1, 2)).gather(-1, first)
    order = first.gather(-1, group.sort(dim=-1, stable=True).indices)[..., :k]
    taken = there.gather(-1, order)
    if mass is not None:
        share = torch.where(there & (scores > 0), scores, 0).double()
        before = share.gather(-1, order).cumsum(-1) - share.gather(-1, order)
        taken = taken & (forced.gather(-1, order) | (before < mass * share.sum(-1, keepdim=True)))
    index = torch.where(taken, order, n).sort(dim=-1).values
    return torch.where(index == n, -1, index), taken.sum(-1)
