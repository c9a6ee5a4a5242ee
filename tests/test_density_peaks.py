"""density_peaks against brute force and the specification, on every backend."""

import math

import fastok
import pytest
import torch
from fastok import reference
from fastok.testing import Backend, assert_same, over_backends
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def signs(*shape: int) -> Tensor:
    """±1 entries: squared distances are exact, so ties are ties everywhere."""
    return torch.randint(0, 2, shape).float() * 2 - 1


def product_of_peaks(x: Tensor, neighbors: int) -> Tensor:
    """Density times separation in fp64, by the formula; NaN for tokens that are not finite. One sample ``[N,D]``."""
    usable = x.isfinite().all(-1)
    points = x[usable].double()
    distance = (points[:, None] - points).norm(dim=-1) / math.sqrt(max(x.shape[1], 1))
    density = torch.exp(-distance.sort(1).values[:, :neighbors].square().mean(1))
    earlier = torch.arange(len(points)) < torch.arange(len(points))[:, None]
    denser = (density > density[:, None]) | ((density == density[:, None]) & earlier)
    separation = torch.where(denser, distance, math.inf).amin(1)
    separation = torch.where(denser.any(1), separation, distance.amax(1))
    out = torch.full(x.shape[:1], math.nan, dtype=torch.float64)
    out[usable] = density * separation
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "n", "width", "neighbors"), [(2, 17, 3, 1), (2, 17, 3, 5), (1, 90, 33, 5), (3, 50, 64, 50), (1, 5, 1, 2)]
)
@over_backends("density_peaks")
def test_density_peaks(backend: Backend, batch: int, n: int, width: int, neighbors: int, dtype: torch.dtype) -> None:
    """Each pick's product is, to fp32 rounding, the largest that was left."""
    x = torch.randn(batch, n, width).to(dtype)
    index = backend.density_peaks(x, n, neighbors)
    for b in range(batch):
        product = product_of_peaks(x[b], neighbors)
        assert sorted(index[b].tolist()) == list(range(n))
        torch.testing.assert_close(product[index[b]], product.sort(descending=True).values, rtol=1e-5, atol=0)
    assert_same(backend.density_peaks(x, n // 3, neighbors), index[:, : n // 3])


POINTS = {
    "signs": lambda: signs(3, 37, 16),
    "signs-wide": lambda: signs(2, 70, 64),
    "all-equal": lambda: torch.ones(1, 130, 16),
    "equal-pairs": lambda: signs(2, 20, 8).repeat_interleave(2, 1),
    "nan-tokens": lambda: torch.where(torch.rand(3, 41, 1) < 0.3, math.nan, signs(3, 41, 4)),
    "all-nan": lambda: torch.full((2, 9, 4), math.nan),
    "infinite": lambda: torch.where(torch.rand(2, 30, 1) < 0.2, math.inf, signs(2, 30, 4)),
    "far": lambda: signs(2, 30, 16) * 64,
    "clusters": lambda: torch.randint(0, 4, (2, 80, 1)) * 16 + signs(2, 80, 16),
    "random": lambda: torch.randn(1, 130, 70),
    "random-far": lambda: torch.randn(2, 70, 33) + 300,
    "random-clusters": lambda: torch.randn(2, 5, 40).mul(9).repeat(1, 15, 1) + torch.randn(2, 75, 40),
    "close": lambda: 1 + torch.randn(2, 60, 20) * 2.0**-12,
    "tiny": lambda: torch.randn(2, 50, 16) * 2.0**-70,
    "no-width": lambda: torch.ones(2, 7, 0),
    "one-token": lambda: signs(2, 1, 4),
    "two-tokens": lambda: signs(2, 2, 4),
    "no-token": lambda: signs(2, 0, 4),
    "no-sample": lambda: signs(0, 6, 4),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over_backends("density_peaks", without=("reference",))
def test_density_peaks_of_exact_inputs(backend: Backend, dtype: torch.dtype) -> None:
    for name, make in POINTS.items():
        x = make().to(dtype)
        n = x.shape[1]
        for neighbors in {1, min(5, max(n, 1)), max(n, 1)}:
            args = (x, n, neighbors)
            assert_same(backend.density_peaks(*args), reference.peak_rows(*args), f"{name}, neighbors={neighbors}")


def test_density_peaks_do_not_depend_on_threads() -> None:
    x, threads = torch.randn(1, 500, 40), torch.get_num_threads()
    wanted = fastok.reference.density_peaks(x, 200, neighbors=20)
    try:
        for count in (1, 2, 3, 4, 7):
            torch.set_num_threads(count)
            assert_same(fastok.density_peaks(x, 200, neighbors=20), wanted, f"with {count} threads")
    finally:
        torch.set_num_threads(threads)


@given(
    n=st.integers(0, 60), width=st.sampled_from([1, 3, 16]), neighbors=st.integers(1, 60), k=st.integers(0, 60),
    seed=st.integers(0, 1000), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
@over_backends("density_peaks", without=("reference", "cuda"))
def test_density_peaks_of_any_arguments(backend: Backend, n, width, neighbors, k, seed, dtype) -> None:
    torch.manual_seed(seed)
    args = (signs(2, n, width).to(dtype), min(k, n), min(neighbors, max(n, 1)))
    assert_same(backend.density_peaks(*args), reference.peak_rows(*args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over_backends("density_peaks", without=("reference",))
def test_density_peaks_of_views(backend: Backend, dtype: torch.dtype) -> None:
    wide = torch.full((3, 40, 120), math.nan, dtype=dtype)
    for offset in range(0, 20, 3):
        view = wide[:, 2:37, offset : offset + 64]
        view.copy_(signs(3, 35, 64))
        assert_same(backend.density_peaks(view, 9, 5), reference.peak_rows(view, 9, 5), f"offset {offset}")
        wide.fill_(math.nan)
    transposed = signs(2, 16, 30).to(dtype).mT
    assert_same(backend.density_peaks(transposed, 9, 5), reference.peak_rows(transposed, 9, 5), "transposed")


@over_backends("density_peaks")
def test_density_peaks_do_not_depend_on_the_batch(backend: Backend) -> None:
    x = torch.randn(5, 131, 48)
    whole = backend.density_peaks(x, 40, 5)
    assert_same(backend.density_peaks(x, 40, 5), whole)
    for b in range(5):
        assert_same(backend.density_peaks(x[b : b + 1], 40, 5), whole[b : b + 1])


def test_density_peaks_find_clusters() -> None:
    centres = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0]])
    label = torch.arange(60) % 3
    x = centres[label] + torch.randn(60, 2)
    index = fastok.density_peaks(x[None], 3, neighbors=5)
    assert sorted(label[index[0]].tolist()) == [0, 1, 2]
    assert_same(index, reference.density_peaks(x[None], 3, neighbors=5))


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"k": 7}, ValueError, r"k must be within \[0, N=6\], got 7"),
        ({"k": -1}, ValueError, "got -1"),
        ({"k": 1.5}, TypeError, "k must be an int"),
        ({"neighbors": 0}, ValueError, r"neighbors must be within \[1, N=6\], got 0"),
        ({"neighbors": 7}, ValueError, "got 7"),
        ({"neighbors": 2.0}, TypeError, "neighbors must be an int"),
        ({"x": torch.ones(2, 6, 3, dtype=torch.int64)}, TypeError, "x must have dtype"),
        ({"x": torch.ones(6, 3)}, ValueError, r"x must be \[B,N,D\]"),
    ],
)
def test_density_peaks_bad_arguments(kwargs: dict, error: type[Exception], text: str) -> None:
    arguments = {"x": torch.randn(2, 6, 3), "k": 2, "neighbors": 3} | kwargs
    with pytest.raises(error, match=text):
        fastok.density_peaks(arguments.pop("x"), arguments.pop("k"), **arguments)
