"""``attention_decode``: few query rows over a cache. Checks and fake kernels; kernels in csrc/decode."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

import torch
from torch import Tensor

from .autograd import without_gradient
from .checks import (
    ACTIVATIONS,
    INTEGERS,
    check_dtype,
    check_range,
    check_same_device,
    check_scale,
    check_shape,
    check_softcap,
    check_tensor,
)

if TYPE_CHECKING:
    from ..caches.packed import PackedKV

MOST_ROWS = 16


@dataclass(frozen=True, eq=False)
class PagedKV:
    """A dense cache in pages, as vLLM and FlashInfer keep it.

    Attributes:
        k_pages, v_pages: ``[pages,P,G,D]`` fp32, fp16 or bf16, any strides with a contiguous last dimension: a
            transposed ``[pages,G,P,D]`` will do, and so will two slices of ``[pages,2,P,G,D]``.
        block_table: int32 ``[B,n]``, the pages of each sequence in order; entries behind its last page are not read.
        seq_lens: integer ``[B]`` (or ``[B,G]``), the number of tokens.
    """

    k_pages: Tensor
    v_pages: Tensor
    block_table: Tensor
    seq_lens: Tensor


Dense = tuple[Tensor, Tensor, Tensor | None]


def attention_decode(
    q: Tensor,
    cache: Union["PackedKV", PagedKV, Dense],
    *,
    tokens: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a sequence's newest tokens over its cache, read in place.

    Args:
        q: ``[B,S,H,D]`` fp32, fp16 or bf16 in the dtype of the cache, S at most 16: the newest S tokens, whose keys are
            in the cache already. Row i sees the first ``length - S + 1 + i`` tokens of its head.
        cache: a :class:`PackedKV`, a :class:`PagedKV`, or ``(k, v, seq_lens)`` with ``k, v [B,T,G,D]`` of any strides
            (last dimension contiguous) and ``seq_lens`` int ``[B]`` or ``[B,G]``, None for T. G divides H.
        tokens: int ``[B,G,K]`` or ``[B,H,K]``: only these places of each KV head (or each query head) take part; -1
            and places at or beyond the head's end are skipped, a place listed twice counts once, order is free.
        key_bias: fp32 ``[B,T]`` or ``[B,H,T]``, added after the softcap; -inf hides a key. T is that of ``k``, in pages
            or packed at least the longest length. Not differentiable.
        scale: of the dot products, ``D ** -0.5`` by default.
        softcap: logits become ``softcap * tanh(logits / softcap)``; None or 0: they stay.

    Returns:
        ``out`` like ``q`` (with the width of ``v``), ``lse`` fp32 ``[B,H,S]``, natural logarithm. A row that sees
        nothing has output 0 and lse -inf.

    Raises:
        TypeError: a dtype that is not listed. ValueError: shapes, devices or numbers that do not fit; more than 16
        rows. RuntimeError: a packed cache whose directory and data contradict each other.

    Softmax in fp32; scales of packed codes are folded into queries, probabilities or sums, never into a copy of the
    cache. Deterministic: keys are taken in parts of a fixed size and merged in order, whatever batch and threads. Not
    differentiable. No host synchronisation on CUDA. Flash-Decoding (Dao et al., 2023).
    """
    q, scale, cap = query_arguments(q, scale, softcap)
    if isinstance(cache, (PagedKV, tuple)):
        k, v, seq_lens, table, total = dense_arguments(q, cache)
        _check_extras(q, k.shape[2], tokens, key_bias)
        if key_bias is not None:
            key_bias = _over_places(key_bias, seq_lens if table is not None else None, total)
        out, lse = torch.ops.fastok.decode(q, k, v, seq_lens, table, scale, cap, key_bias, tokens)
        return out, lse
    if not hasattr(cache, "hot_k"):
        raise TypeError(f"cache must be a PackedKV, a PagedKV or (k, v, seq_lens); got {type(cache).__name__}")
    hot = cache.hot_k
    check_dtype("q", q, (hot.dtype,))
    check_shape("q", q, (hot.shape[0], None, None, hot.shape[3]), "[B,S,H,D] of the cache")
    check_same_device("q", q, "the cache", hot.device)
    _check_extras(q, hot.shape[1], tokens, key_bias)
    if key_bias is not None and q.device.type == "cpu" and hot.shape[0] and not torch.compiler.is_compiling():
        _check_places(key_bias, int(cache.seq_lens.max()))
    out, lse = torch.ops.fastok.decode_packed(q, *cache.arguments, cache.format.flat, scale, cap, key_bias, tokens)
    return out, lse


def query_arguments(q: Tensor, scale: float | None, softcap: float | None) -> tuple[Tensor, float, float]:
    """What the ops take: queries, scale, softcap."""
    check_dtype("q", q, ACTIVATIONS)
    check_shape("q", q, (None, None, None, None), "[B,S,H,D]")
    rows, width = q.shape[1], q.shape[3]
    if rows > MOST_ROWS:
        raise ValueError(f"q must have at most {MOST_ROWS} rows, got {rows}: use fastok.attention for more")
    if width % 8 or not 8 <= width <= 256:
        raise ValueError(f"q must have a head dim that is a multiple of 8 from 8 to 256, got {width}")
    return without_gradient(q), check_scale(scale, width), check_softcap(softcap)


def dense_arguments(q: Tensor, cache: PagedKV | Dense) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int]:
    """Keys, values, lengths, table (None if contiguous) and the most keys a sequence can have."""
    batch, _, heads, width = q.shape
    table: Tensor | None = None
    seq_lens: Tensor | None
    if isinstance(cache, PagedKV):
        k, v, table, seq_lens = cache.k_pages, cache.v_pages, cache.block_table, cache.seq_lens
        names = ("k_pages", "v_pages")
        lead: tuple[int | None, ...] = (None, None)
        check_shape("block_table", table, (batch, None), "[B,n] of q")
        check_dtype("block_table", table, (torch.int32, torch.int64))
        check_same_device("block_table", table, "q", q.device)
    else:
        if len(cache) != 3:
            raise ValueError(f"cache must be a PackedKV, a PagedKV or (k, v, seq_lens); got a tuple of {len(cache)}")
        k, v, seq_lens = cache
        names, lead = ("k", "v"), (batch, None)
    for name, x in zip(names, (k, v), strict=True):
        check_dtype(name, x, (q.dtype,))
        check_same_device(name, x, "q", q.device)
    check_shape(names[0], k, (*lead, None, width), "[B,T,G,D]" if table is None else "[pages,P,G,D]")
    check_shape(names[1], v, (*k.shape[:3], None), f"that of {names[0]} up to the width")
    if v.shape[3] % 8 or not 8 <= v.shape[3] <= 256:
        raise ValueError(f"{names[1]} must have a head dim that is a multiple of 8 from 8 to 256, got {v.shape[3]}")
    if table is not None and k.shape[1] == 0:
        raise ValueError(f"{names[0]} must have pages of at least one token, got {list(k.shape)}")
    total = k.shape[1] if table is None else table.shape[1] * k.shape[1]
    groups = k.shape[2]
    if groups == 0 or heads % groups:
        raise ValueError(f"{names[0]} must have a number of heads that divides {heads}, those of q; got {groups}")
    if seq_lens is not None:
        check_dtype("seq_lens", seq_lens, INTEGERS)
        check_shape("seq_lens", seq_lens, (batch, groups) if seq_lens.dim() == 2 else (batch,), "[B] or [B,G]")
        check_same_device("seq_lens", seq_lens, "q", q.device)
        if q.device.type == "cpu":
            check_range("seq_lens", seq_lens, 0, total + 1)
            if table is not None and not torch.compiler.is_compiling():
                pages = -(-(seq_lens if seq_lens.dim() == 2 else seq_lens[:, None]).amax(1, keepdim=True) // k.shape[1])
                used = torch.arange(table.shape[1]) < pages
                check_range("block_table", table[used], 0, k.shape[0])
    elif table is not None:
        raise ValueError("seq_lens must be given for a PagedKV, got None")
    return without_gradient(k), without_gradient(v), seq_lens, table, total


def _check_extras(q: Tensor, groups: int, tokens: Tensor | None, key_bias: Tensor | None) -> None:
    batch, _, heads, _ = q.shape
    if groups == 0 or heads % groups:
        raise ValueError(f"q must have a number of heads that {groups} KV heads divide; got {heads}")
    if tokens is not None:
        check_tensor("tokens", tokens)
        lists = tokens.shape[1] if tokens.dim() == 3 else None
        if lists not in (groups, heads):
            raise ValueError(f"tokens must be [B,G,K] or [B,H,K], here [{batch}, {groups} or {heads}, *]; "
                             f"got {list(tokens.shape)}")  # fmt: skip
        check_shape("tokens", tokens, (batch, lists, None), "[B,G,K] or [B,H,K]")
        check_dtype("tokens", tokens, (torch.int64, torch.int32))
        check_same_device("tokens", tokens, "q", q.device)
    if key_bias is not None:
        check_dtype("key_bias", key_bias, (torch.float32,))
        of_head = (heads,) if key_bias.dim() == 3 else ()
        check_shape("key_bias", key_bias, (batch, *of_head, None), "[B,T] or [B,H,T]")
        check_same_device("key_bias", key_bias, "q", q.device)


def _check_places(key_bias: Tensor, least: int) -> None:
    """ValueError unless there are as many places as tokens."""
    if key_bias.shape[-1] < least:
        raise ValueError(
            f"key_bias must have T >= {least} places, as many as there are tokens; got {key_bias.shape[-1]}"
        )


def _over_places(key_bias: Tensor, seq_lens: Tensor | None, total: int) -> Tensor:
    """``key_bias`` with all ``total`` places that a cache has. In pages (with ``seq_lens``), the last ones may lack."""
    places = key_bias.shape[-1]
    if places > total or (places < total and seq_lens is None):
        raise ValueError(f"key_bias must have T = {total} places, as many as the cache; got {places}")
    if places == total or seq_lens is None:
        return key_bias
    if seq_lens.device.type == "cpu" and seq_lens.numel() and not torch.compiler.is_compiling():
        _check_places(key_bias, int(seq_lens.max()))
    return torch.nn.functional.pad(key_bias, (0, total - places))


@torch.library.register_fake("fastok::decode")
def _decode_fake(
    q: Tensor, k: Tensor, v: Tensor, seq_lens: Tensor | None, block_table: Tensor | None, scale: float, softcap: float,
    key_bias: Tensor | None, tokens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, rows, heads, _ = q.shape
    return q.new_empty(batch, rows, heads, v.shape[3]), q.new_empty(batch, heads, rows, dtype=torch.float32)


@torch.library.register_fake("fastok::decode_packed")
def _decode_packed_fake(
    q: Tensor, data: Tensor, offset: Tensor, counts: Tensor, classes: Tensor | None, key_channels: Tensor | None,
    value_channels: Tensor | None, hot_k: Tensor, hot_v: Tensor, hot_len: Tensor, fmt: list[int], scale: float,
    softcap: float, key_bias: Tensor | None, tokens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
