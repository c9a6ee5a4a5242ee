"""TokenMap and SoftMap: construction, composition, views of the map, bad arguments."""

import math
from unittest.mock import patch

import fastok
import pytest
import torch
from fastok import SoftMap, TokenMap
from fastok.testing import assert_same
from torch._subclasses.fake_tensor import FakeTensorMode

ASSIGN = torch.tensor([[0, 1, -1, 0, 2, 1], [2, 2, 2, -1, -1, 0]])


def example() -> TokenMap:
    return TokenMap.from_assign(ASSIGN, 3)


def test_from_assign() -> None:
    token_map = example()
    assert token_map.assign.dtype == torch.int32
    assert (token_map.n_in, token_map.n_out, token_map.batch_size) == (6, 3, 2)
    assert token_map.counts.tolist() == [3, 3]
    assert token_map.offsets.tolist() == [[0, 2, 4, 5], [0, 1, 1, 4]]
    assert token_map.members.tolist() == [[0, 3, 1, 5, 4, -1], [5, 0, 1, 2, -1, -1]]
    assert token_map.representative.tolist() == [[0, 1, 4], [5, -1, 0]]
    assert token_map.keep_mask.tolist() == (ASSIGN >= 0).tolist()


def test_merge_modes() -> None:
    x = torch.arange(12.0).reshape(2, 6, 1)
    token_map = example()
    assert token_map.merge(x)[0].flatten().tolist() == [1.5, 3, 4, 11, 0, 7]
    assert token_map.merge(x)[1].flatten().tolist() == [2, 2, 1, 1, 0, 3]
    assert token_map.merge(x, mode="sum")[0].flatten().tolist() == [3, 6, 4, 11, 0, 21]
    assert token_map.merge(x, mode="max")[0].flatten().tolist() == [3, 5, 4, 11, 0, 8]
    assert token_map.prune(x).flatten().tolist() == [0, 1, 4, 11, 0, 6]
    size = torch.tensor([[3.0, 1, 9, 1, 1, 0], [0, 0, 0, 1, 1, 2]])
    y, size_out = token_map.merge(x, size=size)
    assert y.flatten().tolist() == [0.75, 1, 4, 11, 0, 0]
    assert size_out.flatten().tolist() == [4, 1, 1, 2, 0, 0]


def test_sizes_and_weighted_sums_are_conserved() -> None:
    token_map = fastok.bipartite_match(torch.randn(3, 40, 8), 12, protect=1)
    x, size = torch.randn(3, 40, 5), torch.rand(3, 40) + 0.1
    y, size_out = token_map.merge(x, size=size)
    torch.testing.assert_close(size_out.sum(1), size.sum(1))
    torch.testing.assert_close((y * size_out[..., None]).sum(1), (x * size[..., None]).sum(1), atol=1e-4, rtol=1e-4)


def test_unmerge_undoes_merge_on_unmerged_tokens() -> None:
    token_map = fastok.bipartite_match(torch.randn(2, 30, 8), 9)
    x = torch.randn(2, 30, 5)
    y, size = token_map.merge(x)
    back, members = token_map.unmerge(y), token_map.unmerge(size[..., None])[..., 0]
    assert_same(back[members == 1], x[members == 1])
    torch.testing.assert_close(back, token_map.dense().mT.ne(0).float() @ token_map.dense() @ x)


def test_keep_and_prune() -> None:
    x = torch.randn(2, 6, 4)
    index = torch.tensor([[4, 0, 2], [1, 5, 3]])
    token_map = TokenMap.keep(index, 6)
    assert_same(token_map.prune(x), x.gather(1, index[..., None].expand(-1, -1, 4)))
    assert token_map.representative.tolist() == index.tolist()
    assert token_map.keep_mask.sum(1).tolist() == [3, 3]
    assert TokenMap.keep(index[:, :0], 6).prune(x).shape == (2, 0, 4)


def test_identity() -> None:
    x = torch.randn(3, 5, 2)
    token_map = TokenMap.identity(3, 5, "cpu")
    assert_same(token_map.merge(x)[0], x)
    assert_same(token_map.dense(), torch.eye(5).expand(3, 5, 5))


def test_then_is_composition() -> None:
    first = example()
    second = TokenMap.from_assign(torch.tensor([[1, 0, 1], [-1, 0, 0]]), 2, counts=torch.tensor([2, 1]))
    both = first.then(second)
    assert both.assign.tolist() == [[1, 0, -1, 1, 1, 0], [0, 0, 0, -1, -1, -1]]
    assert both.counts.tolist() == [2, 1]
    x, size = torch.randn(2, 6, 3), torch.rand(2, 6) + 0.5
    y, size_out = second.merge(first.merge(x, size=size)[0], size=first.merge(x, size=size)[1])
    torch.testing.assert_close(both.merge(x, size=size)[0], y)
    torch.testing.assert_close(both.merge(x, size=size)[1], size_out)
    nothing = TokenMap.keep(torch.empty(2, 0, dtype=torch.int64), 6).then(
        TokenMap.from_assign(torch.empty(2, 0).int(), 4)
    )
    assert nothing.assign.tolist() == [[-1] * 6] * 2


def test_pack_ragged() -> None:
    metric = torch.ones(3, 8, 4)
    metric[1] = torch.eye(8)[:, :4] - torch.eye(8)[:, 4:]
    token_map = fastok.bipartite_match(metric, 2, threshold=0.5)
    assert token_map.n_out == 8
    assert token_map.counts.tolist() == [6, 8, 6]
    y, size = token_map.merge(torch.randn(3, 8, 5))
    packed, cu_seqlens = token_map.pack(y)
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens.tolist() == [0, 6, 14, 20]
    for b, count in enumerate(token_map.counts.tolist()):
        assert_same(packed[cu_seqlens[b] : cu_seqlens[b + 1]], y[b, :count])
        assert not y[b, count:].any()
    assert token_map.pack(size)[0].shape == (20,)


def test_dense_is_row_stochastic() -> None:
    dense = example().dense()
    assert dense.sum(-1).tolist() == [[1, 1, 1], [1, 0, 1]]
    x = torch.randn(2, 6, 3)
    torch.testing.assert_close(dense @ x, example().merge(x)[0])


def test_to_moves_everything() -> None:
    moved = example().to("meta")
    assert {t.device.type for t in (moved.assign, moved.counts, moved.offsets, moved.members)} == {"meta"}


def soft() -> SoftMap:
    return SoftMap.from_dense(example().dense())


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: TokenMap.from_assign(ASSIGN, 2), ValueError, r"assign must be within \[-1, 2\), got 2"),
        (lambda: TokenMap.from_assign(ASSIGN - 1, 3), ValueError, "got -2"),
        (lambda: TokenMap.from_assign(ASSIGN.float(), 3), TypeError, "assign must be an integer tensor"),
        (lambda: TokenMap.from_assign(ASSIGN[0], 3), ValueError, "assign must have shape"),
        (lambda: TokenMap.from_assign(ASSIGN, -1), ValueError, "n_out must be >= 0"),
        (lambda: TokenMap.from_assign(ASSIGN, 3, counts=torch.tensor([1, 4])), ValueError, "counts"),
        (lambda: TokenMap.from_assign(ASSIGN, 3, counts=torch.tensor([1])), ValueError, "counts"),
        (lambda: TokenMap.from_assign(ASSIGN, 3, counts=torch.tensor([3, 2])), ValueError, r"\[3, 3\]; got \[3, 2\]"),
        (lambda: TokenMap.keep(torch.tensor([[0]])[:, :0], -1), ValueError, "n_in must be >= 0"),
        (lambda: SoftMap.from_rows(torch.tensor([[[0]]]), torch.ones(1, 1, 1), 2.0), TypeError, "n_in must be an int"),
        (lambda: TokenMap.keep(torch.tensor([[0, 0]]), 3), ValueError, "repeated"),
        (lambda: TokenMap.keep(torch.tensor([[0, 3]]), 3), ValueError, "got 3"),
        (lambda: example().merge(torch.randn(2, 5, 4)), ValueError, "x must have shape"),
        (lambda: example().merge(torch.randn(1, 6, 4)), ValueError, "x must have shape"),
        (lambda: example().merge(torch.ones(2, 6, 4, dtype=torch.int64)), TypeError, "x must have dtype"),
        (lambda: example().merge(torch.randn(2, 6, 4), mode="median"), ValueError, "'median'"),
        (lambda: example().merge(torch.randn(2, 6, 4), size=torch.ones(2, 5)), ValueError, "size must have shape"),
        (
            lambda: example().merge(torch.randn(2, 6, 4), size=torch.ones(2, 6).long()),
            TypeError,
            "size must have dtype",
        ),
        (lambda: example().merge(torch.randn(2, 6, 4, device="meta")), ValueError, "same device"),
        (lambda: TokenMap.from_assign([[0, 1]], 3), TypeError, "assign must be a tensor, got list"),
        (lambda: TokenMap.from_assign(ASSIGN, 3.0), TypeError, "n_out must be an int, got float 3.0"),
        (lambda: TokenMap.identity(-1, 3), ValueError, "batch must be >= 0, got -1"),
        (lambda: TokenMap.identity(1, 3.5), TypeError, "n must be an int, got float 3.5"),
        (lambda: example().merge(None), TypeError, "x must be a tensor, got NoneType"),
        (
            lambda: example().unmerge(torch.randn(2, 4, 4)),
            ValueError,
            r"y must have shape .*\[2, 3, \*\]; got \[2, 4, 4\]",
        ),
        (lambda: example().then(3), TypeError, "other must be a TokenMap or a SoftMap, got int 3"),
        (
            lambda: example().unmerge(torch.randn(2, 3, 4), residual=torch.randn(2, 6, 4).half()),
            TypeError,
            "residual must have dtype float32",
        ),
        (lambda: example().unmerge(torch.randn(2, 3, 4), residual=torch.randn(2, 6, 5)), ValueError, "residual"),
        (lambda: example().then(example()), ValueError, "other must take what this map gives"),
        (
            lambda: example().pack(torch.randn(2, 6, 4)),
            ValueError,
            r"x must be \[B,M,…\] .*\[2, 3, …\]; got \[2, 6, 4\]",
        ),
        (lambda: soft().unmerge(torch.ones(2, 3, 4).long()), TypeError, "y must have dtype"),
        (lambda: soft().unmerge(torch.ones(2, 3)), ValueError, "y must have shape"),
        (lambda: SoftMap.from_dense([[1.0]]), TypeError, "weights must be a tensor"),
        (lambda: SoftMap.from_rows(None, torch.ones(1, 1, 1), 4), TypeError, "index must be a tensor"),
        (lambda: SoftMap.from_dense(torch.ones(2, 3)), ValueError, "weights must be"),
        (lambda: SoftMap.from_rows(torch.tensor([[[4]]]), torch.ones(1, 1, 1), 4), ValueError, "got 4"),
    ],
)
def test_bad_arguments(call, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


# ---- SoftMap ---------------------------------------------------------------------------------------------------------


def test_soft_map_of_a_token_map_means_the_same() -> None:
    hard = TokenMap.from_assign(ASSIGN, 3)
    soft = SoftMap.from_dense(hard.dense())
    x, size = torch.randn(2, 6, 4), torch.rand(2, 6) + 0.5
    for given in (None, size):
        for got, wanted in zip(soft.merge(x, size=given), hard.merge(x, size=given), strict=True):
            torch.testing.assert_close(got, wanted)
    y = torch.randn(2, 3, 4)
    torch.testing.assert_close(soft.unmerge(y), hard.unmerge(y))
    torch.testing.assert_close(soft.unmerge(y, residual=x), hard.unmerge(y, residual=x))


def test_soft_map_rows_and_row_sums() -> None:
    index = torch.tensor([[[0, 3], [2, -1], [1, 1]]])
    weight = torch.tensor([[[0.5, 1.5], [2.0, 9.0], [0.25, 0.25]]])
    soft = SoftMap.from_rows(index, weight, 4)
    assert soft.dense()[0].tolist() == [[0.5, 0, 0, 1.5], [0, 0, 2, 0], [0, 0.5, 0, 0]]
    x = torch.randn(1, 4, 3)
    torch.testing.assert_close(soft.merge(x)[0], soft.dense() @ x)
    size = torch.tensor([[3.0, 1, 1, 1]])
    y, size_out = soft.merge(x, size=size)
    weights = torch.tensor([[1.0, 0, 0, 1], [0, 0, 2, 0], [0, 0.5, 0, 0]])  # row 0: 1.5 and 1.5, scaled to sum 2
    torch.testing.assert_close(y[0], weights @ x[0])
    assert size_out[0].tolist() == [4, 1, 1]
    torch.testing.assert_close(size_out.sum(), size.sum())


def test_soft_map_composition_and_gradients() -> None:
    weights = torch.rand(2, 4, 6, requires_grad=True)
    soft = SoftMap.from_dense(weights)
    hard = TokenMap.from_assign(torch.tensor([[0, 1, 1, 0]] * 2), 2)
    x = torch.randn(2, 6, 3)
    torch.testing.assert_close(soft.then(hard).merge(x)[0], hard.merge(soft.merge(x)[0])[0])
    torch.testing.assert_close(TokenMap.identity(2, 6).then(soft).merge(x)[0], soft.merge(x)[0])
    soft.merge(x.requires_grad_())[0].sum().backward()
    assert weights.grad is not None
    assert x.grad is not None


def product_by_hand(weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``weights @ x`` in fp64, term by term, without those whose weight is 0."""
    rows = [[x[b, row != 0] for row in sample] for b, sample in enumerate(weights)]
    sums = [
        [(row[row != 0, None].double() * part.double()).sum(0) for row, part in zip(sample, parts, strict=True)]
        for sample, parts in zip(weights, rows, strict=True)
    ]
    return torch.stack([torch.stack(sample) for sample in sums])


def connected() -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of which half are 0, one token that no output takes, and tokens with each kind of no number."""
    weights = torch.randn(2, 4, 7) * (torch.rand(2, 4, 7) < 0.5)
    weights[:, :, 3] = 0
    weights[:, 0] = 0
    x = torch.randn(2, 7, 5)
    x[0, 3], x[0, 1, 2], x[0, 4, 2], x[0, 4, 3], x[1, 3] = math.nan, math.inf, -math.inf, math.nan, -math.inf
    return weights, x


over_sight = pytest.mark.parametrize("compiling", [False, True], ids=["looks at results", "does not"])


@over_sight
def test_soft_map_weights_of_zero_leave_tokens_out(compiling: bool) -> None:
    weights, x = connected()
    soft, size = SoftMap.from_dense(weights), torch.rand(2, 7) + 0.5
    size[:, 3] = math.nan
    with patch.object(torch.compiler, "is_compiling", lambda: compiling):
        y, _ = soft.merge(x)
        sized, size_out = soft.merge(x, size=size)
        back = soft.unmerge(x[:, :4])
        composed = soft.then(SoftMap.from_dense(torch.eye(4).repeat(2, 1, 1)))
    torch.testing.assert_close(y.double(), product_by_hand(weights, x), equal_nan=True, rtol=1e-5, atol=1e-5)
    assert y[:, 0].eq(0).all()
    assert y.isfinite().any()
    assert not y.isfinite().all()
    by_size = weights * torch.where(size.isnan(), 0, size)[:, None]
    by_size = by_size * (weights.sum(-1) / by_size.sum(-1).where(by_size.sum(-1) != 0, 1))[..., None]
    torch.testing.assert_close(sized.double(), product_by_hand(by_size, x), equal_nan=True, rtol=1e-4, atol=1e-4)
    assert size_out.isfinite().all()
    shares = weights / weights.sum(1, keepdim=True).where(weights.sum(1, keepdim=True) != 0, 1)
    wanted = product_by_hand(shares.mT, x[:, :4])
    torch.testing.assert_close(back.double(), wanted, equal_nan=True, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(composed.dense(), weights)


@over_sight
def test_soft_map_weights_of_zero_leave_gradients_alone(compiling: bool) -> None:
    """Neither NaN in a token nor in an output's gradient goes where there is no weight."""
    weights, x = connected()
    grad = torch.randn(2, 4, 5)
    grad[0, 2] = math.nan
    weights.requires_grad_(), x.requires_grad_()
    with patch.object(torch.compiler, "is_compiling", lambda: compiling):
        SoftMap.from_dense(weights).merge(x)[0].backward(grad)
    assert x.grad is not None
    assert weights.grad is not None
    wanted = product_by_hand(weights.detach().mT, grad)
    torch.testing.assert_close(x.grad.double(), wanted, equal_nan=True, rtol=1e-5, atol=1e-5)
    numbers = torch.where(x.detach().isfinite(), x.detach(), 0)
    torch.testing.assert_close(weights.grad, grad @ numbers.mT, equal_nan=True)
    assert weights.grad[0, [0, 1, 3]].isfinite().all()


def test_soft_map_sums_in_fp32_under_autocast() -> None:
    weights, x = torch.rand(2, 5, 300, requires_grad=True), torch.randn(2, 300, 8, requires_grad=True)
    y = torch.randn(2, 5, 8)

    def everything() -> tuple[torch.Tensor, ...]:
        soft = SoftMap.from_dense(weights)
        merged, back = soft.merge(x)[0], soft.unmerge(y)
        then, after = soft.then(soft.from_dense(torch.ones(2, 1, 5))), TokenMap.identity(2, 300).then(soft)
        return merged, back, then.dense(), after.dense(), *torch.autograd.grad(merged.sum(), (weights, x))

    expected = everything()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = everything()
    for one, other in zip(got, expected, strict=True):
        assert_same(one, other)


def test_soft_map_compiles() -> None:
    weights, x = connected()

    def both(weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        soft = SoftMap.from_dense(weights)
        return soft.unmerge(soft.merge(x)[0])

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(weights, x), both(weights, x), equal_nan=True)
    numbers = (weights.double().requires_grad_(), torch.randn(2, 7, 2, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(lambda weights, x: SoftMap.from_dense(weights).merge(x)[0], numbers)


# ---- torch.compile ---------------------------------------------------------------------------------------------------


def test_maps_of_fake_tensors() -> None:
    """What has no values is not looked at: shapes come out as they do with values."""
    index, x = torch.tensor([[[0, 2], [-1, 5]]] * 2), torch.randn(2, 6, 8)
    src, dst = torch.tensor([0, 2, 4]), torch.tensor([1, 3])
    cu_seqlens = torch.tensor([0, 2, 6], dtype=torch.int32)

    def shapes(assign, x, index, src, dst, cu_seqlens) -> list[torch.Size]:  # type: ignore[no-untyped-def]
        maps = (
            TokenMap.from_assign(assign, 3, counts=assign.amax(1) + 1),
            TokenMap.keep(index[:, 1], 6),
            SoftMap.from_rows(index, index.float(), 6),
            fastok.bipartite_match(x, 2, partition=(src, dst)),
        )
        q = x[0, :, None]
        packed = fastok.attention(q, q, q, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens)
        return [part.shape for token_map in maps for part in token_map.merge(x)] + [part.shape for part in packed]

    arguments = (ASSIGN, x, index.clamp(min=1), src, dst, cu_seqlens)
    with FakeTensorMode() as mode:
        got = shapes(*(mode.from_tensor(each) for each in arguments))
    assert got == shapes(*arguments)


def test_maps_live_inside_compiled_functions() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def reduce(x: torch.Tensor) -> tuple[torch.Tensor, TokenMap]:
        token_map = fastok.bipartite_match(x, 3, protect=1)
        y, size = token_map.merge(x)
        second = fastok.bipartite_match(y, 2, protect=1)
        y, _ = second.merge(y, size=size)
        both = token_map.then(second)
        return both.unmerge(y, residual=x) + both.prune(x).sum(), both

    x = torch.randn(2, 12, 8)
    out, both = reduce(x)
    expected = fastok.bipartite_match(x, 3, protect=1)
    y, size = expected.merge(x)
    second = fastok.bipartite_match(y, 2, protect=1)
    assert_same(both.assign, expected.then(second).assign)
    torch.testing.assert_close(out, both.unmerge(second.merge(y, size=size)[0], residual=x) + both.prune(x).sum())
