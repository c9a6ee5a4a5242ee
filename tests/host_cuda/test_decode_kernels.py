"""What CUDA's decode promises beyond being right: where parts lie, and so the bits of a result, depends on little."""

import math

import pytest
import torch
from fastok.testing import assert_same
from fastok.testing.examples import EXAMPLES, Arguments, verify
from torch import Tensor

host_cuda = pytest.importorskip("host_cuda", reason="the harness was not built", exc_type=ImportError)

H, G, D = 4, 2, 64


def made(batch: int, tokens: int, rows: int = 1, dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(batch, rows, H, D).to(dtype)
    k, v = torch.randn(2, batch, tokens, G, D).to(dtype).unbind(0)
    return q, k, v


def decode(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None, tokens: Tensor | None = None, **how):  # type: ignore[no-untyped-def]
    table, bias = how.get("table"), how.get("bias")
    return host_cuda.decode(q, k, v, lengths, table, D**-0.5, 0.0, bias, tokens)


def assert_both_same(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    assert_same(got[0], wanted[0], "out")
    assert_same(got[1], wanted[1], "lse")


DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("example", [x for x in EXAMPLES["decode"] if x.size != "large"], ids=lambda x: x.name)
def test_examples(example, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    arguments = example.arguments(dtype)
    verify("decode", arguments, host_cuda.decode(*arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "heads", "width", "v_width", "total", "lists"), [
    (1, (6, 6), 32, 32, 300, None), (16, (10, 2), 8, 104, 70, "group"), (1, (8, 1), 128, 128, 900, "head"),
    (5, (4, 2), 192, 72, 40, None), (2, (9, 3), 256, 256, 130, "group"),
])  # fmt: skip
def test_widths_groups_rows_and_lists(rows, heads, width, v_width, total, lists, dtype) -> None:  # type: ignore[no-untyped-def]
    n_heads, groups = heads
    q = torch.randn(2, rows, n_heads, width).to(dtype)
    k, v = (torch.randn(2, groups, total, w).to(dtype).transpose(1, 2) for w in (width, v_width))
    lengths = torch.randint(rows, total + 1, (2, groups), dtype=torch.int32)
    tokens = None
    if lists is not None:
        tokens = torch.randint(-1, total, (2, n_heads if lists == "head" else groups, total // 2))
    bias = torch.where(torch.rand(2, n_heads, total) < 0.2, -math.inf, torch.randn(2, n_heads, total))
    for softcap, added in ((0.0, None), (2.0, bias)):
        arguments: Arguments = (q, k, v, lengths, None, width**-0.5, softcap, added, tokens)
        verify("decode", arguments, host_cuda.decode(*arguments))


@pytest.mark.parametrize("length", [1, 256, 257, 700])
def test_bits_depend_on_the_tokens_alone(length: int) -> None:
    """Not on the room that a cache has, the batch, or the pages."""
    q, k, v = made(1, length, 3)
    alone = decode(q, k, v)
    rest = torch.full((1, 20000 - length, G, D), math.nan, dtype=q.dtype)
    roomy = [torch.cat([x, rest], 1) for x in (k, v)]
    others = made(2, 20000, 3)
    together = [torch.cat([x, y]) for x, y in zip((q, *roomy), others, strict=True)]
    lengths = torch.tensor([length, 5, 300])
    out, lse = decode(*together, lengths)
    assert_both_same((out[:1], lse[:1]), alone)
    pages = [torch.cat([x, rest[:, : 16 - length % 16]], 1).view(-1, 16, G, D) for x in (k, v)]
    order = torch.randperm(len(pages[0]))
    shuffled = [x[order] for x in pages]
    paged = decode(q, *shuffled, torch.tensor([length]), table=order.argsort()[None].int())
    assert_both_same(paged, alone)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_list_of_all_tokens_is_the_dense_kernel(dtype: torch.dtype) -> None:
    q, k, v = made(2, 600, 2)
    lengths = torch.tensor([600, 70])
    everything = torch.arange(600, dtype=dtype)
    wanted = decode(q, k, v, lengths)
    assert_both_same(decode(q, k, v, lengths, everything.expand(2, G, -1)), wanted)
    mixed = torch.cat([everything, everything[:50]])[torch.randperm(650)].expand(2, H, -1)
    listed = decode(q, k, v, lengths, mixed)
    torch.testing.assert_close(listed[0], wanted[0], atol=2e-3, rtol=0)
    torch.testing.assert_close(listed[1], wanted[1], atol=1e-5, rtol=1e-5)


def test_lists_in_any_order_with_repetitions_and_places_that_are_none() -> None:
    q, k, v = made(2, 500)
    chosen = torch.randperm(500)[:90].sort().values
    wanted = decode(q, k, v, None, chosen.expand(2, G, -1))
    for spoiled in (
        chosen.flip(0),
        torch.cat([chosen, chosen[:7]]),
        torch.cat([chosen, torch.tensor([-1, -1])]),
        torch.stack([chosen, torch.full_like(chosen, -1)], 1).flatten(),
        torch.cat([torch.tensor([500, 2**40, -5]), chosen]),
    ):
        assert_both_same(decode(q, k, v, None, spoiled.expand(2, G, -1)), wanted)


def test_rows_without_keys_are_nothing() -> None:
    q, k, v = made(3, 300, 4)
    lengths = torch.tensor([0, 2, 300])
    out, lse = decode(q, k, v, lengths)
    assert bool((out[0] == 0).all())
    assert bool((lse[0] == -math.inf).all())
    assert (lse[1, 0] == -math.inf).tolist() == [True, True, False, False]
    nothing = torch.full((3, G, 5), -1)
    out, lse = decode(q, k, v, None, nothing)
    assert bool((out == 0).all())
    assert bool((lse == -math.inf).all())
    out, lse = decode(q, k, v, None, nothing[..., :0])
    assert bool((lse == -math.inf).all())


def test_a_table_may_hold_anything() -> None:
    """Tokens of pages that there are not are skipped, and nothing outside the arrays is read."""
    q, k, v = made(1, 64)
    pages = [x.view(-1, 16, G, D) for x in (k, v)]
    wrong = torch.tensor([[0, 4, 2, -1]])
    there = torch.cat([torch.arange(16), torch.arange(32, 48)]).expand(1, G, -1)
    got = decode(q, *pages, torch.tensor([64]), table=wrong)
    wanted = decode(q, k, v, None, there)
    torch.testing.assert_close(got[0], wanted[0], atol=2e-3, rtol=0)
    torch.testing.assert_close(got[1], wanted[1], atol=1e-5, rtol=1e-5)
