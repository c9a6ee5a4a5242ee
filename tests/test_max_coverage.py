"""max_coverage against a plain oracle and the specification, on every backend."""

import importlib
import importlib.util
import math

import fastok
import pytest
import torch
from fastok import reference
from fastok.reference.max_coverage import coverage_exponent, similarities
from fastok.testing import Backend, assert_accurate, assert_same, over_backends
from fastok.testing.examples.registry import odd_view, signs
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def oracle(similarity: Tensor, k: int, modular: Tensor | None) -> tuple[list[int], list[float], float]:
    """One sample ``similarity[R,N]`` in fp64, as the formula reads: picks, gains, and how close a decision was."""
    rows, n = similarity.shape
    table = similarity.double().tolist()
    extra = [0.0] * n if modular is None else modular.double().tolist()
    covered = [0.0] * rows
    picks: list[int] = []
    gains: list[float] = []
    margin = math.inf
    for _ in range(k):
        gain = {
            j: sum(max(0.0, table[r][j] - covered[r]) for r in range(rows)) + extra[j]
            for j in range(n)
            if j not in picks
        }
        ranked = sorted(gain.values(), reverse=True)
        if len(ranked) > 1 and ranked[0] > ranked[1]:
            margin = min(margin, ranked[0] - ranked[1])
        best = min(j for j, value in gain.items() if value == ranked[0])
        picks.append(best)
        gains.append(gain[best])
        covered = [max(covered[r], table[r][best]) for r in range(rows)]
    return picks, gains, margin


def assert_same_picks(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...], name: str = "") -> None:
    for part, first, second in zip(("index", "gain"), got, wanted, strict=True):
        assert_same(first, second, f"{name}: {part}")


def holes(x: Tensor, value: float, share: float = 0.02) -> Tensor:
    return torch.where(torch.rand(x.shape) < share, value, x)


MATRICES = {
    "random": lambda: torch.randn(2, 40, 53),
    "softmax": lambda: (5 * torch.randn(2, 61, 40)).softmax(-1),
    "tenths": lambda: torch.randint(-10, 11, (2, 17, 30)) / 10,
    "few-levels": lambda: torch.randint(-1, 2, (2, 9, 64)).float(),
    "negative": lambda: -torch.rand(2, 10, 20),
    "all-equal": lambda: torch.ones(2, 8, 33),
    "zeros": lambda: torch.zeros(2, 8, 33),
    "nan": lambda: holes(torch.randn(2, 20, 30), math.nan, 0.01),
    "nan-row": lambda: torch.randn(2, 5, 12).index_fill(1, torch.tensor([2]), math.nan),
    "infinite": lambda: holes(holes(torch.randn(2, 20, 30), math.inf), -math.inf),
    "huge-and-tiny": lambda: torch.randn(2, 12, 30) * 2.0 ** torch.randint(-140, 120, (2, 12, 30)),
    "subnormal": lambda: torch.randn(2, 12, 30) * 2.0**-140,
    "one-row": lambda: torch.randn(2, 1, 20),
    "one-token": lambda: torch.randn(2, 20, 1),
    "no-row": lambda: torch.randn(2, 0, 20),
    "no-token": lambda: torch.randn(2, 20, 0),
    "no-sample": lambda: torch.randn(0, 4, 5),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_modular", [False, True])
@over_backends("max_coverage", without=("reference",))
def test_matrices_give_the_same_bits_as_the_specification(
    backend: Backend, with_modular: bool, dtype: torch.dtype
) -> None:
    for name, make in MATRICES.items():
        similarity = make().to(dtype)
        batch, _, n = similarity.shape
        modular = torch.randn(batch, n) if with_modular else None
        if modular is not None and name == "tenths":
            modular[:, ::5] = math.nan
            modular[:, 1::5] = -math.inf
        for k in sorted({min(1, n), n // 3, n}):
            args = (similarity, None, None, k, modular)
            assert_same_picks(backend.max_coverage(*args), reference.max_coverage_picks(*args), f"{name}, k={k}")


def with_nan(x: Tensor) -> Tensor:
    return torch.where(torch.rand(*x.shape[:2], 1) < 0.3, math.nan, x)


PAIRS = {
    "random": lambda: (torch.randn(2, 37, 40), torch.randn(2, 53, 40)),
    "same": lambda: (torch.randn(2, 45, 33),) * 2,
    "signs": lambda: (signs(2, 30, 16), signs(2, 45, 16)),
    "duplicates": lambda: (torch.randn(2, 9, 24).repeat(1, 3, 1), torch.randn(2, 12, 24).repeat(1, 4, 1)),
    "zeros": lambda: (torch.randn(2, 9, 8), torch.zeros(2, 12, 8)),
    "nan-token": lambda: (torch.randn(2, 9, 8), with_nan(torch.randn(2, 20, 8))),
    "nan-row": lambda: (with_nan(torch.randn(2, 9, 8)), torch.randn(2, 20, 8)),
    "huge-and-tiny": lambda: (torch.randn(2, 9, 8) * 2.0**100, torch.randn(2, 20, 8) * 2.0**-60),
    "no-row": lambda: (torch.randn(2, 0, 8), torch.randn(2, 12, 8)),
    "no-token": lambda: (torch.randn(2, 5, 8), torch.randn(2, 0, 8)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over_backends("max_coverage", without=("reference",))
def test_pairs_give_the_same_bits_as_the_specification(backend: Backend, dtype: torch.dtype) -> None:
    for name, make in PAIRS.items():
        y, x = (part.to(dtype) for part in make())
        n = x.shape[1]
        for k in sorted({min(1, n), n // 3, n}):
            args = (None, y, x, k, None)
            assert_same_picks(backend.max_coverage(*args), reference.max_coverage_picks(*args), f"{name}, k={k}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pairs_that_cuda_on_host_does_not_keep(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    host = pytest.importorskip("host_cuda")
    monkeypatch.setattr(host, "most_similarities", 0)
    for name, make in (PAIRS | {"tiles": lambda: (torch.randn(1, 67, 9), torch.randn(1, 140, 9))}).items():
        y, x = (part.to(dtype) for part in make())
        modular = torch.randn(x.shape[:2])
        args = (None, y, x, x.shape[1] // 8, modular)
        assert_same_picks(host.max_coverage(*args), reference.max_coverage_picks(*args), name)


@pytest.mark.parametrize("with_modular", [False, True])
@over_backends("max_coverage")
def test_matches_the_oracle(backend: Backend, with_modular: bool) -> None:
    compared = 0
    for seed in range(20):
        torch.manual_seed(seed)
        similarity = torch.randn(1, 11, 17)
        modular = torch.rand(1, 17) if with_modular else None
        picks, gains, margin = oracle(similarity[0], 9, None if modular is None else modular[0])
        if margin < 1e-9:
            continue
        index, gain = backend.max_coverage(similarity, None, None, 9, modular)
        assert index[0].tolist() == picks
        assert_accurate(gain[0], torch.tensor(gains, dtype=torch.float64), torch.tensor(gains))
        compared += 1
    assert compared >= 4


@over_backends("max_coverage")
def test_exact_ties_go_to_the_lowest_index(backend: Backend) -> None:
    for seed in range(10):
        torch.manual_seed(seed)
        similarity = torch.randint(-2, 5, (1, 6, 25)) / 4
        picks, gains, _ = oracle(similarity[0], 25, None)
        index, gain = backend.max_coverage(similarity, None, None, 25, None)
        assert index[0].tolist() == picks
        assert gain[0].tolist() == gains


def test_by_hand() -> None:
    similarity = torch.tensor([[[0.9, 0.5, -1.0, 0.0], [0.1, 0.6, 0.0, 0.0], [0.0, 0.0, 0.25, 0.5]]])
    index, gain = fastok.max_coverage(similarity, 4)
    # Gains 1.0, 1.1, 0.25, 0.5; then 0.9 - 0.5 for token 0 and 0.5 for token 3; then 0.4; token 2 adds nothing.
    assert index.tolist() == [[1, 3, 0, 2]]
    torch.testing.assert_close(gain, torch.tensor([[1.1, 0.5, 0.4, 0.0]]))
    index, gain = fastok.max_coverage(similarity, 2, modular=torch.tensor([[0.0, 0.0, 2.0, 0.0]]))
    assert index.tolist() == [[2, 1]]
    torch.testing.assert_close(gain, torch.tensor([[2.25, 1.1]]))


@given(
    batch=st.integers(0, 3),
    rows=st.integers(0, 40),
    n=st.integers(1, 50),
    share=st.floats(0, 1),
    levels=st.sampled_from([0, 2, 7]),
    with_modular=st.booleans(),
    pair=st.booleans(),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(DTYPES),
)
@over_backends("max_coverage", without=("reference", "cuda"))
def test_any_arguments_match_the_specification(
    backend: Backend, batch, rows, n, share, levels, with_modular, pair, seed, dtype
) -> None:
    torch.manual_seed(seed)
    modular = torch.randint(-2, 3, (batch, n)) / 4 if with_modular else None
    k = round(share * n)
    if pair:
        width = 1 + seed % 40
        make = torch.randn if levels == 0 else signs
        args = (None, make(batch, rows, width).to(dtype), make(batch, n, width).to(dtype), k, modular)
    else:
        similarity = (
            torch.randn(batch, rows, n) if levels == 0 else torch.randint(-levels, levels, (batch, rows, n)) / 8
        )
        args = (similarity.to(dtype), None, None, k, modular)
    assert_same_picks(backend.max_coverage(*args), reference.max_coverage_picks(*args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over_backends("max_coverage", without=("reference",))
def test_strided_and_misaligned_views(backend: Backend, dtype: torch.dtype) -> None:
    modular = torch.randn(31, 3).T
    for similarity in (
        odd_view(torch.randn(3, 20, 31).to(dtype)),
        torch.randn(3, 31, 20).to(dtype).mT,
        torch.randn(1, 20, 31).to(dtype).expand(3, -1, -1),
        torch.randn(3, 20, 62).to(dtype)[..., ::2],
    ):
        args = (similarity, None, None, 12, modular)
        assert_same_picks(backend.max_coverage(*args), reference.max_coverage_picks(*args))
    y, x = odd_view(torch.randn(3, 20, 37).to(dtype)), torch.randn(3, 37, 31).to(dtype).mT
    args = (None, y, x, 12, modular)
    assert_same_picks(backend.max_coverage(*args), reference.max_coverage_picks(*args))


@over_backends("max_coverage", without=("reference", "cuda-on-host"))
def test_batch_invariant_whatever_the_threads(backend: Backend) -> None:
    y, x = torch.randn(4, 50, 48), torch.randn(4, 120, 48)
    whole = backend.max_coverage(None, y, x, 30, None)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_same_picks(backend.max_coverage(None, y, x, 30, None), whole)
            for b in range(4):
                alone = backend.max_coverage(None, y[b : b + 1], x[b : b + 1], 30, None)
                assert_same_picks(alone, tuple(part[b : b + 1] for part in whole))
    finally:
        torch.set_num_threads(before)


def test_planners() -> None:
    native = pytest.importorskip("fastok._native")
    assert native.plan_kept_columns(576, 576) == 576
    assert native.plan_kept_columns(8192, 8192) == 8192
    assert native.plan_kept_columns(16384, 16384) == 4096
    assert native.plan_kept_columns(1 << 30, 100) == 64
    assert native.plan_kept_columns(0, 100) == 100
    # As the specification has it.
    for rows in (0, 1, 2, 3, 4, 5, 1023, 1024, 1025):
        for value in (0.0, 1e-30, 0.7, 1.0, 3e38):
            similarity = torch.full((1, rows, 1), value)
            peak_exponent = int(torch.frexp(torch.tensor(value if rows else 0.0)).exponent)
            assert native.coverage_exponent(rows, peak_exponent) == int(coverage_exponent(similarity)), (rows, value)


def test_more_similarities_than_are_kept() -> None:
    # Rows given many times over: the same picks, and as many times the gain.
    y, x = torch.randn(1, 512, 3), torch.randn(1, 70, 3)
    times = 2048
    if importlib.util.find_spec("fastok._native") is not None:
        assert importlib.import_module("fastok._native").plan_kept_columns(512 * times, 70) < 70
    index, gain = fastok.max_coverage((y.repeat(1, times, 1), x), 12)
    once_index, once_gain = fastok.max_coverage((y, x), 12)
    assert_same(index, once_index)
    torch.testing.assert_close(gain, times * once_gain, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "text"),
    [
        ((torch.randn(2, 3, 8), 9), {}, ValueError, r"k must be within \[0, N=8\], got 9"),
        ((torch.randn(2, 3, 8), -1), {}, ValueError, "k must be within"),
        ((torch.randn(2, 3, 8), 2.0), {}, TypeError, "k must be an int"),
        ((torch.randn(3, 8), 2), {}, ValueError, "similarity must be"),
        ((torch.ones(2, 3, 8, dtype=torch.int64), 2), {}, TypeError, "similarity must have dtype"),
        (([torch.randn(2, 3, 4)], 2), {}, TypeError, "similarity must be a tensor or a pair"),
        (((3, torch.randn(2, 3, 4)), 2), {}, TypeError, "similarity's y must be a tensor, got int 3"),
        (((torch.randn(2, 3, 4), torch.randn(2, 8, 5)), 2), {}, ValueError, "y must have shape"),
        (((torch.randn(2, 3, 4).half(), torch.randn(2, 8, 4)), 2), {}, TypeError, "y must have dtype float32"),
        ((torch.randn(2, 3, 8), 2), {"modular": torch.randn(2, 7)}, ValueError, "modular must have shape"),
        (
            (torch.randn(2, 3, 8), 2),
            {"modular": torch.randn(2, 8).half()},
            TypeError,
            "modular must have dtype float32",
        ),
    ],
)
def test_bad_arguments(args: tuple, kwargs: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        fastok.max_coverage(*args, **kwargs)


def test_public_function_agrees_with_its_specification() -> None:
    y, x, modular = torch.randn(2, 20, 16), torch.randn(2, 30, 16), torch.rand(2, 30)
    similarity = similarities(y, x)
    assert_same_picks(
        fastok.max_coverage((y, x), 9, modular=modular), reference.max_coverage((y, x), 9, modular=modular)
    )
    assert_same_picks(fastok.max_coverage(similarity, 9), fastok.max_coverage((y, x), 9))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    y, x = torch.randn(2, 10, 24).to(dtype), torch.randn(2, 30, 24).to(dtype)
    torch.library.opcheck(torch.ops.fastok.max_coverage, (None, y, x, 7, torch.randn(2, 30)))
    torch.library.opcheck(torch.ops.fastok.max_coverage, (torch.randn(2, 9, 30).to(dtype), None, None, 7, None))


def test_compiles_without_recompilation() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda y, x: fastok.max_coverage((y, x), 5), fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (20, 33, 47):
            y, x = torch.randn(2, n + 3, 16), torch.randn(2, n, 16)
            assert_same_picks(compiled(y, x), fastok.max_coverage((y, x), 5))
