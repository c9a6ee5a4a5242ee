"""fastok.flash over paged caches, on every backend: against the same call on the contiguous caches they hold."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from fastok.flash import flash_attn_varlen_func, flash_attn_with_kvcache
from fastok.ops import pages
from fastok.testing import Backend, assert_same, over_backends
from hypothesis import given
from hypothesis import strategies as st
from test_flash import check, draw, over_masks, plain
from torch import Tensor


@contextmanager
def through(backend: Backend) -> Iterator[list[str]]:
    """Both ops run on ``backend``; the list is filled with the names of those that did."""
    ran: list[str] = []

    def noting(op: str) -> Any:
        function = getattr(backend, op)  # before it is patched

        def call(*args: Any) -> Any:
            ran.append(op)
            return function(*args)

        return call

    decode, attention = noting("decode"), noting("attention")
    with patch.object(torch.ops.fastok, "decode", decode), patch.object(torch.ops.fastok, "attention", attention):
        yield ran


def paged(cache: Tensor, size: int, table: Tensor, spare: int = 2) -> Tensor:
    """Contiguous ``[B,T,G,D]`` in shuffled pages; those that no sequence has are NaN."""
    held = torch.full((int(table.max()) + 1 + spare, size, *cache.shape[2:]), float("nan"), dtype=cache.dtype)
    held[table.long()] = cache.unflatten(1, (-1, size))
    return held


def shuffled(batch: int, columns: int) -> Tensor:
    return torch.randperm(batch * columns).view(batch, columns).int()


def unpaged(held: Tensor, table: Tensor) -> Tensor:
    return held[table.long()].flatten(1, 2)


@over_masks
@pytest.mark.parametrize("rows", [1, 3, 18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@over_backends("decode")
def test_pages_hold_what_a_contiguous_cache_holds(
    backend: Backend, dtype: torch.dtype, rows: int, options: dict[str, Any]
) -> None:
    lengths, table = [21, 7, 40], shuffled(3, 5)
    q, k, v = draw(3, rows, 4, 16, dtype=dtype), draw(3, 40, 2, 16, dtype=dtype), draw(3, 40, 2, 16, dtype=dtype)
    k_pages, v_pages = paged(k, 8, table), paged(v, 8, table)
    for b, n in enumerate(lengths):  # nobody must look behind the last token, nor at entries of no page
        place = torch.arange(n, 40)
        k_pages[table[b, place // 8].long(), place % 8] = v_pages[table[b, place // 8].long(), place % 8] = torch.nan
        table[b, -(-n // 8) :] = -7
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    with through(backend) as ran, patch.object(pages, "CHUNK", 13):
        out, lse = flash_attn_with_kvcache(
            q, k_pages, v_pages, cache_seqlens=seqlens, block_table=table, return_softmax_lse=True, **options
        )
    left, right = options.get("window_size", (-1, -1))
    in_place = rows == 1 or (rows == 3 and left < 0 and (right < 0 or right >= rows - 1))
    assert set(ran) == {"decode" if in_place else "attention"}
    assert lse.shape == (3, 4, rows)
    for b, n in enumerate(lengths):
        check(out[b], lse[b], q[b], k[b, :n], v[b, :n], **plain(options))


@pytest.mark.parametrize("lengths", [13, [13, 0, 9]], ids=["int", "tensor"])
@pytest.mark.parametrize("rotary", [None, True, False], ids=["no rotary", "interleaved", "halves"])
@over_backends("decode")
def test_new_tokens_are_written_into_their_pages(backend: Backend, rotary: bool | None, lengths: Any) -> None:
    """Exactly what the contiguous cache holds afterwards, and nothing else in any page."""
    q, k, v = draw(3, 4, 4, 16), draw(3, 4, 2, 16), draw(3, 4, 2, 16)
    caches, table = [draw(3, 24, 2, 16) for _ in range(2)], shuffled(3, 4)
    held = [paged(x, 6, table) for x in caches]
    before = [x.clone() for x in held]
    seqlens = torch.tensor(lengths, dtype=torch.int32) if isinstance(lengths, list) else lengths
    angles = torch.rand(24, 4) * 6
    turn: dict[str, Any] = {} if rotary is None else {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
    turn["rotary_interleaved"] = bool(rotary)
    truth = flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=seqlens, causal=True, **turn)
    with through(backend):
        out = flash_attn_with_kvcache(
            q, *held, k, v, cache_seqlens=seqlens, block_table=table, causal=True, **turn
        )  # fmt: skip
    torch.testing.assert_close(out, truth)
    for x, pages_of_x, old in zip(caches, held, before, strict=True):
        assert_same(unpaged(pages_of_x, table), x)
        spare = old.shape[0] - table.numel()
        assert_same(pages_of_x[-spare:], old[-spare:])


@given(
    batch=st.integers(0, 3), rows=st.integers(0, 20), size=st.sampled_from([1, 3, 16]), columns=st.integers(1, 5),
    ratio=st.integers(1, 3), left=st.integers(-1, 30), right=st.integers(-1, 20), causal=st.booleans(),
    chunk=st.integers(1, 30), seed=st.integers(0, 999),
)  # fmt: skip
def test_any_pages(
    batch: int, rows: int, size: int, columns: int, ratio: int, left: int, right: int, causal: bool, chunk: int,
    seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    table, capacity = shuffled(batch, columns), size * columns
    q, k, v = draw(batch, rows, 2 * ratio, 8), draw(batch, capacity, 2, 8), draw(batch, capacity, 2, 8)
    held = [paged(x, size, table) if batch else draw(2, size, 2, 8) for x in (k, v)]
    lengths = torch.randint(0, capacity + 1, (batch,), dtype=torch.int32)
    how: dict[str, Any] = {"causal": causal, "window_size": (left, right), "cache_seqlens": lengths}
    with patch.object(pages, "CHUNK", chunk):
        out, lse = flash_attn_with_kvcache(q, *held, block_table=table, return_softmax_lse=True, **how)
    truth, truth_lse = flash_attn_with_kvcache(q, k, v, return_softmax_lse=True, **how)
    torch.testing.assert_close(out, truth)
    torch.testing.assert_close(lse, truth_lse)


def test_strides_of_vllm_and_flashinfer() -> None:
    """``[pages,2,P,G,D]`` sliced, and heads before tokens; read in place and written in place."""
    table, k, v = shuffled(2, 3), draw(2, 12, 2, 16), draw(2, 12, 2, 16)
    both = torch.stack([paged(k, 4, table), paged(v, 4, table)], 1)
    heads_first = [both[:, i].transpose(1, 2).contiguous().transpose(1, 2) for i in range(2)]
    for rows in (1, 20):
        q, new = draw(2, rows, 4, 16), draw(2, 1, 2, 16)
        truth = flash_attn_with_kvcache(q, k, v, new, new, cache_seqlens=7)
        for held in ([both[:, 0], both[:, 1]], heads_first):
            out = flash_attn_with_kvcache(q, *held, new, new, cache_seqlens=7, block_table=table)
            torch.testing.assert_close(out, truth)
            assert_same(unpaged(held[0], table), k)


@pytest.mark.parametrize("lengths_q", [[1, 1, 1], [4, 0, 7], [0, 0, 2]], ids=str)
@over_masks
@over_backends("decode")
def test_packed_queries_over_pages(backend: Backend, options: dict[str, Any], lengths_q: list[int]) -> None:
    lengths_k, table = [9, 3, 20], shuffled(3, 5)
    q, k, v = draw(sum(lengths_q), 4, 16), draw(3, 20, 2, 16), draw(3, 20, 2, 16)
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int() for x in (lengths_q, lengths_k))
    with through(backend) as ran, patch.object(pages, "CHUNK", 8):
        out, lse, _ = flash_attn_varlen_func(
            q, paged(k, 4, table), paged(v, 4, table), cu_q, cu_k, max(lengths_q), 20, block_table=table,
            return_attn_probs=True, **options,
        )  # fmt: skip
    assert set(ran) == {"decode" if max(lengths_q) == 1 else "attention"}
    assert lse.shape == (4, sum(lengths_q))
    for b, (piece, of_lse, part) in enumerate(
        zip(out.split(lengths_q), lse.split(lengths_q, 1), q.split(lengths_q), strict=True)
    ):
        check(piece, of_lse, part, k[b, : lengths_k[b]], v[b, : lengths_k[b]], **plain(options))


@pytest.mark.parametrize("rows", [1, 20])
def test_compiles_without_graph_breaks(rows: int) -> None:
    torch._dynamo.reset()
    table, caches = shuffled(2, 3), [draw(2, 12, 2, 16) for _ in range(2)]
    q, new = draw(2, rows, 4, 16), draw(2, 2, 2, 16)
    held, again = ([paged(x, 4, table) for x in caches] for _ in range(2))
    how: dict[str, Any] = {"cache_seqlens": torch.tensor([4, 9]), "block_table": table, "window_size": (5, 0)}
    compiled = torch.compile(flash_attn_with_kvcache, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        compiled(q, *held, new, new, **how), flash_attn_with_kvcache(q, *again, new, new, **how)
    )  # fmt: skip
    assert_same(held[0], again[0])


def test_no_copy_of_the_cache_is_made() -> None:
    """Keys are gathered a chunk at a time, and no further back than the window."""
    table = shuffled(1, 512)
    k, v = draw(512, 32, 1, 8), draw(512, 32, 1, 8)
    seen: list[int] = []
    between = pages.attention_between

    def noting(q: Tensor, k: Tensor, *args: Any) -> Any:
        seen.append(k.shape[1])
        return between(q, k, *args)

    with patch.object(pages, "attention_between", noting):
        flash_attn_with_kvcache(draw(1, 40, 1, 8), k, v, block_table=table, causal=True)
        assert seen == [pages.CHUNK] * 4
        seen.clear()
        flash_attn_with_kvcache(draw(1, 40, 1, 8), k, v, block_table=table, window_size=(100, 0))
        assert seen == [140]


def test_bad_pages() -> None:
    q, held, table = draw(2, 1, 2, 16), draw(5, 8, 2, 16), torch.zeros(2, 3, dtype=torch.int32)
    for error, message, options in (
        (TypeError, "block_table must have dtype int32, int64; got float32", {"block_table": table.float()}),
        (TypeError, "block_table must be a tensor, got list", {"block_table": [[0]]}),
        (ValueError, r"block_table must have shape \[B,n\], here \[2, \*\]; got \[1, 3\]", {"block_table": table[:1]}),
        (ValueError, r"block_table must be within \[0, 5\), got 5", {"block_table": table + 5}),
        (ValueError, "cache_seqlens must fit the cache's 24 tokens, got 25", {"cache_seqlens": 25}),
        (ValueError, r"cache_seqlens must be within \[0, 24\), got 24",
         {"k": q, "v": q, "cache_seqlens": torch.tensor([24, 0])}),
        (TypeError, "softmax_scale must be a number", {"softmax_scale": "1"}),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            flash_attn_with_kvcache(q, held, held.clone(), **{"block_table": table, **options})
    with pytest.raises(ValueError, match="v_cache must have shape that of k_cache"):
        flash_attn_with_kvcache(q, held, held[:, :4], block_table=table)
    with pytest.raises(ValueError, match="k_cache must have a number of heads that divides 2, got 3"):
        flash_attn_with_kvcache(q, *(draw(5, 8, 3, 16),) * 2, block_table=table)
    # Entries that are not looked at may be anything.
    flash_attn_with_kvcache(q, held, held, cache_seqlens=8, block_table=torch.tensor([[0, 99, -1], [4, -5, 99]]))
