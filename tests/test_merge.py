"""build_map, merge, merge_backward and unmerge against the specification, on every backend."""

import math

import pytest
import torch
from fastok import TokenMap, reference
from fastok.testing import Backend, assert_accurate, assert_same, over_backends
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MODES = ("mean", "sum", "max", "first")


def random_map(batch: int, n: int, n_out: int) -> tuple[Tensor, Tensor, Tensor]:
    """(assign, offsets, members) with dropped tokens, empty slots and slots of many members."""
    slots = torch.randint(-1, max(n_out, 1), (batch, n)).clamp(max=n_out - 1)
    slots = torch.where(torch.rand(batch, n) < 0.2, min(2, n_out - 1), slots)
    assign = slots.int()
    return assign, *reference.build_map(assign, n_out)


def everyone_in_slot_0(batch: int, n: int, n_out: int) -> tuple[Tensor, Tensor, Tensor]:
    assign = torch.zeros(batch, n, dtype=torch.int32)
    return assign, *reference.build_map(assign, n_out)


def tokens(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> Tensor:
    x = torch.randn(shape)
    if kind == "huge":
        x = x * (1e4 if dtype == torch.float16 else 1e37)
    elif kind == "tiny":
        x = x * (1e-6 if dtype == torch.float16 else 1e-37)
    elif kind == "equal":
        x = torch.full(shape, 1.7)
    elif kind == "special":
        x = torch.where(
            torch.rand(shape) < 0.1, torch.tensor([math.nan, math.inf, -math.inf, -0.0])[torch.randint(4, shape)], x
        )
    return x.to(dtype)


@over_backends("build_map", without=("reference",))
def test_build_map(backend: Backend) -> None:
    for batch, n, n_out in ((3, 50, 20), (1, 1, 1), (2, 7, 0), (2, 0, 3), (0, 4, 2), (1, 300, 1), (2, 64, 200)):
        assign = random_map(batch, n, n_out)[0]
        for part, got, wanted in zip(
            ("offsets", "members"), backend.build_map(assign, n_out), reference.build_map(assign, n_out), strict=True
        ):
            assert_same(got, wanted, part)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["normal", "huge", "tiny", "equal", "special"])
@over_backends("merge", without=("reference",))
def test_merge_is_as_accurate_as_torch(backend: Backend, kind: str, mode: str, dtype: torch.dtype) -> None:
    for make, batch, n, n_out, width in (
        (random_map, 2, 37, 20, 24),
        (random_map, 1, 60, 9, 37),
        (random_map, 3, 5, 5, 1),
        (everyone_in_slot_0, 2, 33, 3, 130),
    ):
        token_map = make(batch, n, n_out)
        x = tokens((batch, n, width), kind, dtype)
        sizes = torch.randint(1, 9, (batch, n)).float()
        with_zeros = torch.where(torch.rand(batch, n) < 0.3, 0.0, sizes)
        for size in (None, sizes, with_zeros):
            y, size_out = backend.merge(x, *token_map, size, mode)
            truth, truth_size = reference.merge(x.double(), *token_map, size, mode)
            peer, _ = reference.merge(x, *token_map, size, mode)
            assert_accurate(y, truth, peer, name=f"{mode} {tuple(x.shape)}")
            assert_same(size_out, truth_size, "size_out")  # small integers: exact
            if mode in ("max", "first"):
                assert_same(y, peer, mode)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@over_backends("merge_backward", without=("reference",))
def test_merge_backward(backend: Backend, mode: str, dtype: torch.dtype) -> None:
    for batch, n, n_out, width in ((2, 37, 20, 24), (1, 60, 9, 37), (3, 5, 5, 1)):
        token_map = random_map(batch, n, n_out)
        x = torch.randint(-2, 3, (batch, n, width)).to(dtype)  # ties, so that max must choose
        for size in (None, torch.randint(0, 5, (batch, n)).float()):
            y, size_out = reference.merge(x, *token_map, size, mode)
            grad = torch.randn(batch, n_out, width).to(dtype)
            got = backend.merge_backward(grad, x, y, *token_map, size, size_out, mode)
            truth = reference.merge_backward(grad.double(), x.double(), y.double(), *token_map, size, size_out, mode)
            peer = reference.merge_backward(grad, x, y, *token_map, size, size_out, mode)
            assert_accurate(got, truth, peer, name=mode)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over_backends("unmerge", without=("reference",))
def test_unmerge(backend: Backend, dtype: torch.dtype) -> None:
    for batch, n, n_out, width in ((2, 37, 20, 24), (1, 60, 9, 37), (3, 5, 5, 1), (2, 4, 0, 8), (2, 0, 3, 8)):
        token_map = random_map(batch, n, n_out)
        y, residual = torch.randn(batch, n_out, width).to(dtype), torch.randn(batch, n, width).to(dtype)
        assert_same(backend.unmerge(y, *token_map, None), reference.unmerge(y, *token_map, None))
        truth = reference.unmerge(y.double(), *token_map, residual.double())
        assert_accurate(backend.unmerge(y, *token_map, residual), truth, reference.unmerge(y, *token_map, residual))


@given(
    batch=st.integers(0, 3), n=st.integers(0, 30), n_out=st.integers(0, 12), width=st.integers(0, 70),
    mode=st.sampled_from(MODES), sized=st.booleans(), seed=st.integers(0, 1000), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
@over_backends("merge", without=("reference", "cuda", "triton-interpreter"))
def test_merge_any_shape(backend: Backend, batch, n, n_out, width, mode, sized, seed, dtype) -> None:
    torch.manual_seed(seed)
    token_map = random_map(batch, n, n_out)
    x = torch.randint(-8, 9, (batch, n, width)).to(dtype)
    size = torch.randint(0, 3, (batch, n)).float() if sized else None
    y, size_out = backend.merge(x, *token_map, size, mode)
    peer, peer_size = reference.merge(x, *token_map, size, mode)
    assert_accurate(y, reference.merge(x.double(), *token_map, size, mode)[0], peer)
    assert_same(size_out, peer_size)
    got = backend.merge_backward(y, x, y, *token_map, size, size_out, mode)
    truth = reference.merge_backward(y.double(), x.double(), y.double(), *token_map, size, size_out, mode)
    assert_accurate(got, truth, reference.merge_backward(y, x, y, *token_map, size, size_out, mode))
    assert_same(backend.unmerge(y, *token_map, None), reference.unmerge(y, *token_map, None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over_backends("merge", without=("reference",))
def test_views_at_every_offset(backend: Backend, dtype: torch.dtype) -> None:
    token_map = random_map(2, 11, 6)
    storage = torch.full((2, 13, 90), math.nan, dtype=dtype)  # sentinels all around the view
    for offset in range(17):
        view = storage[:, 1:12, offset : offset + 67]
        view.copy_(torch.randn(view.shape))
        for mode in MODES:
            peer = reference.merge(view.contiguous(), *token_map, None, mode)[0]
            y = backend.merge(view, *token_map, None, mode)[0]
            assert_same(y, backend.merge(view.contiguous(), *token_map, None, mode)[0])
            assert_accurate(y, reference.merge(view.double(), *token_map, None, mode)[0], peer)
        storage.fill_(math.nan)
    columns = torch.randn(2, 67, 11).to(dtype).mT  # last dimension not contiguous
    dense = backend.merge(columns.contiguous(), *token_map, None, "sum")[0]
    assert_same(backend.merge(columns, *token_map, None, "sum")[0], dense)


@over_backends("merge", without=("reference", "triton-interpreter"))
def test_merge_is_batch_invariant_and_repeatable(backend: Backend) -> None:
    token_map = random_map(5, 90, 12)
    x, size = torch.randn(5, 90, 50), torch.rand(5, 90)
    y, size_out = backend.merge(x, *token_map, size, "mean")
    assert_same(backend.merge(x, *token_map, size, "mean")[0], y)
    for b in range(5):
        one = [part[b : b + 1] for part in (x, *token_map, size)]
        alone, alone_size = backend.merge(*one, "mean")
        assert_same(alone, y[b : b + 1])
        assert_same(alone_size, size_out[b : b + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
@over_backends("merge", without=("reference", "triton-interpreter", "cuda", "cuda-on-host"))
def test_large_outputs_are_those_of_their_parts(backend: Backend, mode: str, dtype: torch.dtype) -> None:
    """Outputs of 16 MiB and more are copied past the caches."""
    width, n_out = 4096 * 4 // dtype.itemsize, 1040
    x = torch.randn(1, n_out + 60, width + 1).to(dtype)[..., 1:]
    slots = torch.cat([torch.randperm(n_out), torch.randint(n_out, (60,))]).int()[None]
    csr = reference.build_map(slots, n_out)
    whole, size = backend.merge(x, slots, *csr, None, mode)
    for begin, end in ((0, width // 2), (width // 2, width)):
        part, size_of_part = backend.merge(x[..., begin:end], slots, *csr, None, mode)
        assert_same(whole[..., begin:end], part)
        assert_same(size, size_of_part)


def test_thread_count_does_not_change_results() -> None:
    x, size = torch.randn(3, 400, 300), torch.rand(3, 400)
    metric = torch.randn(3, 400, 32)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            from fastok import bipartite_match

            token_map = bipartite_match(metric, 90, protect=1)
            results.append((token_map.assign, *token_map.merge(x, size=size)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert_same(second, first)


# ---- autograd --------------------------------------------------------------------------------------------------------


def some_map(batch: int = 2, n: int = 9, n_out: int = 4) -> TokenMap:
    return TokenMap.from_assign(random_map(batch, n, n_out)[0], n_out)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_merge(mode: str) -> None:
    token_map = some_map()
    x = torch.randn(2, 9, 5, dtype=torch.float64, requires_grad=True)
    size = torch.rand(2, 9) + 0.5
    assert torch.autograd.gradcheck(lambda x: token_map.merge(x, size=size, mode=mode)[0], x)


@pytest.mark.parametrize("mode", MODES)
def test_gradient_of_size(mode: str) -> None:
    token_map = some_map()
    x = torch.randn(2, 9, 5)
    size = (torch.rand(2, 9) + 0.5).requires_grad_()
    weights = torch.randn(2, 4, 5), torch.randn(2, 4)
    y, size_out = token_map.merge(x, size=size, mode=mode)
    ((y * weights[0]).sum() + (size_out * weights[1]).sum()).backward()
    own = size.grad
    exact = size.detach().double().requires_grad_()
    y, size_out = reference.merge(x.double(), token_map.assign, token_map.offsets, token_map.members, exact, mode)
    # The specification's size_out is fp32; sum it again in fp64 for its gradient.
    slot = torch.where(token_map.assign < 0, 4, token_map.assign).long()
    total = torch.zeros(2, 5, dtype=torch.float64).scatter_add(1, slot, exact)[:, :4]
    ((y * weights[0]).sum() + (total * weights[1]).sum()).backward()
    torch.testing.assert_close(own.double(), exact.grad, atol=1e-5, rtol=1e-5)


def test_gradients_of_unmerge() -> None:
    token_map = some_map()
    y = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(2, 9, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y, residual: token_map.unmerge(y, residual=residual), (y, residual))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_autograd_equals_the_specifications(mode: str, dtype: torch.dtype) -> None:
    token_map = some_map(3, 20, 7)
    size = torch.rand(3, 20) + 0.5
    x = torch.randn(3, 20, 16).to(dtype).requires_grad_()
    grad = torch.randn(3, 7, 16).to(dtype)
    (own,) = torch.autograd.grad(token_map.merge(x, size=size, mode=mode)[0], x, grad)
    parts = (token_map.assign, token_map.offsets, token_map.members, size, mode)
    exact = x.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(reference.merge(exact, *parts)[0], exact, grad.double())
    (peer,) = torch.autograd.grad(reference.merge(x, *parts)[0], x, grad)
    assert_accurate(own, truth, peer)


def test_max_sends_the_gradient_to_the_lowest_index() -> None:
    token_map = TokenMap.from_assign(torch.zeros(1, 3, dtype=torch.int32), 1)
    x = torch.tensor([[[1.0], [2.0], [2.0]]], requires_grad=True)
    token_map.merge(x, mode="max")[0].sum().backward()
    assert x.grad.flatten().tolist() == [0, 1, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_opcheck(mode: str, dtype: torch.dtype) -> None:
    token_map = some_map()
    parts = (token_map.assign, token_map.offsets, token_map.members)
    x = torch.randn(2, 9, 5).to(dtype).requires_grad_()
    size = torch.rand(2, 9, requires_grad=True)
    torch.library.opcheck(torch.ops.fastok.merge.default, (x, *parts, size, mode))
    torch.library.opcheck(torch.ops.fastok.merge.default, (x.detach().mT.contiguous().mT, *parts, None, mode))
    y, size_out = torch.ops.fastok.merge(x.detach(), *parts, None, mode)
    torch.library.opcheck(torch.ops.fastok.merge_backward.default, (y, x.detach(), y, *parts, None, size_out, mode))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_unmerge_and_build_map(dtype: torch.dtype) -> None:
    token_map = some_map()
    parts = (token_map.assign, token_map.offsets, token_map.members)
    y = torch.randn(2, 4, 5).to(dtype).requires_grad_()
    residual = torch.randn(2, 9, 5).to(dtype).requires_grad_()
    torch.library.opcheck(torch.ops.fastok.unmerge.default, (y, *parts, residual))
    torch.library.opcheck(torch.ops.fastok.unmerge.default, (y, *parts, None))
    torch.library.opcheck(torch.ops.fastok.build_map.default, (token_map.assign, 4))


def test_gradients_are_of_first_order() -> None:
    """A gradient of a gradient would be wrong, and is refused; where it is only kept possible, nothing changes."""
    x = torch.randn(1, 6, 4, requires_grad=True)
    merged, _ = TokenMap.from_assign(torch.tensor([[0, 0, 1, 2, 1, 2]]), 3).merge(x)
    (plain,) = torch.autograd.grad(merged.square().sum(), x, retain_graph=True)
    (grad,) = torch.autograd.grad(merged.square().sum(), x, create_graph=True)
    assert torch.equal(grad, plain)
    with pytest.raises(NotImplementedError, match="merge: required, a gradient of its gradient"):
        grad.square().sum().backward()
