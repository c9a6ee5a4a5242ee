"""Examples of sparse decode. Scores are exact in every dtype, so that selections are the same everywhere."""

import math
from typing import Any

import torch
from torch import Tensor

from ...caches.labels import LabelCache
from ...reference import sparse as reference
from .cache import rounding_of_decode
from .registry import Arguments, example, odd_view

# ---- label_scores: q, data, scale, channels, kv_heads, shared, seq_lens ----------------------------------------------


def _labelled(
    dtype: torch.dtype, batch: int, rows: int, heads: tuple[int, int], tokens: int, r: int, bits: int, shared: bool
) -> Arguments:
    n_heads, kv_heads = heads
    channels = torch.stack([torch.randperm(64)[:r] for _ in range(kv_heads)])
    labels = LabelCache(channels, bits).append(torch.randn(batch, tokens, kv_heads, 64).to(dtype))
    lengths = torch.randint(tokens // 2, tokens + 1, (batch,))
    lengths[-1] = tokens
    q = torch.randn(batch, rows, n_heads, 64).to(dtype)
    return q, labels.data, labels.scale, channels, kv_heads, shared, lengths


@example("label_scores", "small", "one list for a group")
def _label_small(dtype: torch.dtype) -> Arguments:
    return _labelled(dtype, 2, 1, (4, 2), 37, 8, 16, True)


@example("label_scores", "awkward", "odd number of channels in 4 bits, rows, a score for each head, view")
def _label_codes(dtype: torch.dtype) -> Arguments:
    q, *others = _labelled(dtype, 3, 5, (6, 2), 101, 5, 4, False)
    return (odd_view(q.flatten(2)).unflatten(2, (6, 64)), *others)


@example("label_scores", "large", "32 heads, 65536 tokens, 8 channels")
def _label_long(dtype: torch.dtype) -> Arguments:
    return _labelled(dtype, 1, 1, (32, 8), 65536, 8, 16, True)


# ---- select_tokens: scores, k, mass, sink, recent, seq_lens ----------------------------------------------------------


@example("select_tokens", "small", "sink and recent")
def _select_small(dtype: torch.dtype) -> Arguments:
    return torch.randn(2, 3, 50), 12, None, 2, 3, torch.tensor([50, 9])


@example("select_tokens", "awkward", "ties, NaN, -inf")
def _select_ties(dtype: torch.dtype) -> Arguments:
    scores = torch.randint(-3, 4, (3, 2, 777)).float()
    scores[torch.rand(scores.shape) < 0.1] = math.nan
    scores[torch.rand(scores.shape) < 0.1] = -math.inf
    return scores, 300, None, 0, 1, torch.tensor([777, 310, 0])


@example("select_tokens", "awkward", "by mass")
def _select_mass(dtype: torch.dtype) -> Arguments:
    return torch.randint(0, 9, (2, 2, 200)).float(), 200, 0.9, 4, 8, torch.tensor([200, 77])


@example("select_tokens", "large", "8 heads, 65536 tokens, k=4096")
def _select_long(dtype: torch.dtype) -> Arguments:
    return torch.randn(1, 8, 65536), 4096, None, 4, 64, None


# ---- label_tokens: q, data, scale, channels, kv_heads, shared, k, sink, recent, seq_lens -----------------------------


def _chosen(labelled: Arguments, k: int, sink: int, recent: int) -> Arguments:
    """Queries and labels become small integers, whose products are exact."""
    q, data, scale, *others, lengths = labelled
    if data.is_floating_point():
        data = data.float().round().to(data.dtype)
    return q.float().round().to(q.dtype), data, scale, *others, k, sink, recent, lengths


@example("label_tokens", "small", "one list for a group")
def _tokens_small(dtype: torch.dtype) -> Arguments:
    return _chosen(_labelled(dtype, 2, 1, (4, 2), 37, 8, 16, True), 9, 1, 2)


@example("label_tokens", "awkward", "odd number of channels, rows, a list for each head")
def _tokens_rows(dtype: torch.dtype) -> Arguments:
    return _chosen(_labelled(dtype, 3, 5, (6, 2), 101, 5, 16, False), 40, 0, 5)


@example("label_tokens", "large", "32 heads, 4096 of 65536 tokens, 8 channels")
def _tokens_long(dtype: torch.dtype) -> Arguments:
    return _chosen(_labelled(dtype, 1, 1, (32, 8), 65536, 8, 16, True), 4096, 4, 64)


# ---- double_sparse_decode: q, k, v, seq_lens, block_table, scale, softcap, then as label_tokens without seq_lens -----


def rounding_of_double_sparse_decode(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    """That of `decode` over the same tokens, which no rounding changes."""
    chosen = (*rest[4:], rest[0])
    tokens, _ = reference.label_tokens(q, *chosen)
    return *rounding_of_decode(q, k, v, *rest[:4], None, tokens), None


def _decoded(dtype: torch.dtype, chosen: Arguments, kv_heads: int, softcap: float) -> Arguments:
    q, *labelled, lengths = chosen
    k, v = torch.randn(2, q.shape[0], labelled[0].shape[3], kv_heads, 64).to(dtype)
    return q, k, v, lengths, None, 0.05, softcap, *labelled


@example("double_sparse_decode", "small", "one list for a group")
def _double_small(dtype: torch.dtype) -> Arguments:
    return _decoded(dtype, _chosen(_labelled(dtype, 2, 1, (4, 2), 37, 8, 16, True), 9, 1, 2), 2, 0.0)


@example("double_sparse_decode", "awkward", "odd number of channels, rows, a list for each head, softcap")
def _double_rows(dtype: torch.dtype) -> Arguments:
    return _decoded(dtype, _chosen(_labelled(dtype, 3, 5, (6, 2), 101, 5, 16, False), 40, 0, 5), 2, 3.0)


@example("double_sparse_decode", "large", "32 heads, 4096 of 65536 tokens, 8 channels")
def _double_long(dtype: torch.dtype) -> Arguments:
    return _decoded(dtype, _chosen(_labelled(dtype, 1, 1, (32, 8), 65536, 8, 16, True), 4096, 4, 64), 8, 0.0)
