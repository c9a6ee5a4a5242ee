"""Specifications of sparse decode: channel calibration, label scores, token selection."""

import math

import torch
from torch import Tensor

from .decode import decode

EIGHTHS = 8
"""Parts of a sequence for `fisher_sums`."""


def channel_statistic(q: Tensor, k: Tensor, statistic: str) -> Tensor:
    """fp64 sums over batch and tokens, ``[H,D]`` (``[G,D]`` for ``"k"``): |q|, |k|, or |q * k| of each token."""
    if statistic == "q":
        product = q.double()
    elif statistic == "k":
        product = k.double()
    else:
        product = q.double() * k.double().repeat_interleave(q.shape[2] // k.shape[2], 2)
    return product.abs().flatten(0, 1).sum(0)


def fisher_sums(q: Tensor, k: Tensor, scale: float | None = None, there: Tensor | None = None) -> Tensor:
    """What Fisher's discriminant ratio of any set of channels follows from, fp64 ``[H,1+D,D]``, summed over queries.

    Row 0: by how much each channel's part of q·k is above its mean over the distant keys, in the mean weighted with the
    query's attention. Rows 1 to D: the covariances of the channels' parts over the distant keys. Distant are keys of
    an earlier eighth of the sequence than the query's: nearer ones would be found by their position alone, and are
    most of what is attended to. ``there``: bool ``[B,S]``, tokens that count; None: all.
    """
    heads, head_dim = q.shape[2:]
    scale = head_dim**-0.5 if scale is None else scale
    sums = torch.zeros(heads, 1 + head_dim, head_dim, dtype=torch.float64, device=q.device)
    for row in range(q.shape[0]):
        rows = slice(None) if there is None else there[row]
        queries, keys = (x[row][rows].double().transpose(0, 1) for x in (q, k))
        of_group = queries.unflatten(0, (keys.shape[0], -1))
        tokens = keys.shape[1]
        block = max(1, -(-tokens // EIGHTHS))
        # One KV head at a time: its attention is the largest tensor there is.
        for own, known, total in zip(of_group, keys, sums.unflatten(0, of_group.shape[:2]), strict=True):
            for start in range(block, tokens, block):
                end = min(start + block, tokens)
                asking = own[:, start:end]
                future = torch.ones(end - start, end, dtype=torch.bool, device=q.device).triu(start + 1)
                attention = (scale * asking @ known[:end].T).masked_fill(future, -math.inf).softmax(-1)[..., :start]
                centred = known[:start] - known[:start].mean(0)
                total[:, 0] += (asking * (attention @ centred)).sum(1)
                total[:, 1:] += (asking.transpose(1, 2) @ asking) * (centred.T @ centred / start)
    return sums


def most_discriminating(sums: Tensor, r: int) -> Tensor:
    """int64 ``[H,r]``: of `fisher_sums`, greedily the channels that together make the ratio largest.

    The ratio is (sum of gaps)² over the variance of the sum, negative if the sum of gaps is. Ties go to the lowest
    channel, NaN last.
    """
    gap, covariance = sums[:, 0], sums[:, 1:]
    lowest = torch.finfo(sums.dtype).min
    chosen = torch.zeros(gap.shape, dtype=torch.bool, device=sums.device)
    channels = []
    for _ in range(r):
        together = gap.where(chosen, 0).sum(1, keepdim=True) + gap
        crossed = covariance.where(chosen[:, :, None], 0)
        within = crossed.where(chosen[:, None], 0).sum((1, 2))[:, None]
        variance = within + 2 * crossed.sum(1) + covariance.diagonal(dim1=1, dim2=2)
        ratio = together * together.abs() / variance.clamp(min=torch.finfo(sums.dtype).tiny)
        ratio = torch.where(ratio.isnan(), lowest, ratio.clamp(min=lowest)).masked_fill(chosen, -math.inf)
        channels.append(heaviest(ratio, 1))
        chosen = chosen.scatter(1, channels[-1], True)
    return torch.cat(channels, 1)


def calibrate_channels(q: Tensor, k: Tensor, r: int, *, statistic: str = "qk") -> Tensor:
    """Specification of :func:`fastok.sparse.calibrate_channels`, same arguments and result."""
    if statistic == "fisher":
        return most_discriminating(fisher_sums(q, k), r)
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


def label_tokens(
    q: Tensor, data: Tensor, scale: Tensor | None, channels: Tensor, kv_heads: int, shared: bool, k: int, sink: int,
    recent: int, seq_lens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``torch.ops.fastok.label_tokens``: `select_tokens` of `label_scores`."""
    scores = label_scores(q, data, scale, channels, kv_heads, shared, seq_lens)
    return select_tokens(scores, k, None, sink, recent, seq_lens)


def double_sparse_decode(
    q: Tensor, k: Tensor, v: Tensor, seq_lens: Tensor | None, block_table: Tensor | None, scale: float, softcap: float,
    data: Tensor, label_scale: Tensor | None, channels: Tensor, kv_heads: int, shared: bool, n_keep: int, sink: int,
    recent: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``torch.ops.fastok.double_sparse_decode``: `decode` over the `label_tokens`."""
    tokens, _ = label_tokens(q, data, label_scale, channels, kv_heads, shared, n_keep, sink, recent, seq_lens)
    return *decode(q, k, v, seq_lens, block_table, scale, softcap, None, tokens), tokens
