"""``double_sparse_decode``: label scores, selection, and attention to the selected tokens."""

from typing import TYPE_CHECKING, Union

import torch
from torch import Tensor

from .checks import check_at_least, check_int, check_tensor
from .decode import Dense, PagedKV, attention_decode, dense_arguments, query_arguments
from .sparse import check_labels, label_arguments, label_tokens, most_tokens, query_rows

if TYPE_CHECKING:
    from ..caches.labels import LabelCache
    from ..caches.packed import PackedKV


def double_sparse_decode(
    q: Tensor,
    cache: Union["PackedKV", PagedKV, Dense],
    labels: "LabelCache",
    n_keep: int,
    *,
    sink: int = 0,
    recent: int = 0,
    shared: bool | str = True,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of the newest tokens to the ``n_keep`` cached tokens that their labels say matter most.

    Args:
        q: the S newest queries ``[B,S,H,D]``, S at most 16, or ``[B,H,D]`` for one, after rotary embedding.
        cache: as for `attention_decode`: a `PackedKV`, ``(k, v, seq_lens)`` or a `PagedKV`, with those S tokens in it.
        labels: a `LabelCache` of the same tokens.
        n_keep: tokens attended to, per KV head (``shared``) or per query head.
        sink, recent: first and last tokens always among them. The S newest always are.
        shared: one list per KV head, by the largest score of its group (``"sum"``: by their sum).
        scale, softcap: as for `attention_decode`.

    Returns:
        ``(out[B,S,H,D], lse[B,H,S], tokens)``, tokens int64 ``[B,G|H,K]`` ascending, -1 padded.

    Raises:
        TypeError, ValueError: an argument of another type, shape or range; lengths that differ between the heads of a
        sequence (after ``PackedKV.keep``).

    A sequence of at most ``n_keep`` tokens is attended to in full. Deterministic and batch-invariant; no host
    synchronisation. Differs from the release, where lists are per query head, the newest token can miss its own list,
    and a short sequence attends to empty slots. Yang et al., "Post-Training Sparse Attention with Double Sparsity",
    arXiv 2408.07092.
    """
    q = query_rows(q)
    check_labels(labels)
    check_int("n_keep", n_keep)
    check_at_least("sink", sink, 0)
    check_at_least("recent", recent, 0)
    recent = max(recent, q.shape[1])
    if n_keep < sink + recent:
        raise ValueError(f"n_keep must have room for sink + recent = {sink + recent} tokens, got {n_keep}")
    lengths = _lengths(cache)
    if isinstance(cache, tuple) and lengths is None and len(labels) != cache[0].shape[1]:
        raise ValueError(f"labels must be of the cache's {cache[0].shape[1]} tokens, got {len(labels)}")
    if shared != "sum" and isinstance(cache, (PagedKV, tuple)):
        q, data, label_scale, channels, heads, largest = label_arguments(q, labels, shared, lengths)
        most = most_tokens(n_keep, None, sink, recent, data.shape[3])
        q, scale, cap = query_arguments(q, scale, softcap)
        k, v, _, table, _ = dense_arguments(q, cache)
        if heads not in (k.shape[2], q.shape[2]):
            raise ValueError(f"labels must be of the cache's {k.shape[2]} KV heads, got {heads}")
        return torch.ops.fastok.double_sparse_decode.default(
            q, k, v, lengths, table, scale, cap, data, label_scale, channels, heads, largest, most, sink, recent
        )
    tokens, _ = label_tokens(q, labels, n_keep, sink=sink, recent=recent, shared=shared, seq_lens=lengths)
    out, lse = attention_decode(q, cache, tokens=tokens, scale=scale, softcap=softcap)
    return out, lse, tokens


def _lengths(cache: Union["PackedKV", PagedKV, Dense]) -> Tensor | None:
    """int ``[B]``, the tokens of each sequence; None if they fill a dense cache."""
    if isinstance(cache, tuple):
        if len(cache) != 3:
            raise ValueError(f"cache must be a PackedKV, a PagedKV or (k, v, seq_lens); got a tuple of {len(cache)}")
        lengths = cache[2]
    elif hasattr(cache, "seq_lens"):
        lengths = cache.seq_lens
    else:
        raise TypeError(f"cache must be a PackedKV, a PagedKV or (k, v, seq_lens); got {type(cache).__name__}")
    if lengths is not None:
        check_tensor("seq_lens", lengths)
    if lengths is None or lengths.dim() == 1:
        return lengths
    of_first = lengths[:, 0]
    if (
        not torch.compiler.is_compiling()
        and lengths.device.type == "cpu"
        and bool((lengths != of_first[:, None]).any())
    ):
        raise ValueError(f"cache must have equally many tokens in all heads of a sequence, got {lengths.tolist()}")
    return of_first


@torch.library.register_fake("fastok::double_sparse_decode")
def _double_sparse_decode_fake(
    q: Tensor, k: Tensor, v: Tensor, seq_lens: Tensor | None, block_table: Tensor | None, scale: float, softcap: float,
    data: Tensor, label_scale: Tensor | None, channels: Tensor, kv_heads: int, shared: bool, n_keep: int, sink: int,
    recent: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, rows, heads, _ = q.shape
    tokens = q.new_empty(batch, kv_heads if shared else heads, n_keep, dtype=torch.int64)
    return q.new_empty(batch, rows, heads, v.shape[3]), q.new_empty(batch, heads, rows, dtype=torch.float32), tokens
