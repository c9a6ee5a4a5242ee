"""k_center against a plain oracle and the specification, on every backend."""

import math

import fastok
import pytest
import torch
from fastok import reference
from fastok.testing import Backend, assert_accurate, assert_same, over_backends
from fastok.testing.examples.registry import odd_view, signs
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
METRICS = ("cosine", "euclidean")
OBJECTIVES = ("max_min", "max_sum")
STARTS = ("isolated", "norm", "first", "given")


def oracle(
    x: Tensor, k: int, metric: str, objective: str, start: str, first: int | None = None, mask: Tensor | None = None
) -> tuple[list[int], list[float], float]:
    """One sample ``x[N,D]`` in fp64, token by token: picks, distances, and how close a decision was."""
    x = x.double()
    n = len(x)
    unit = x / x.norm(dim=1, keepdim=True).clamp(min=1e-12)
    distance = (
        (1 - unit @ unit.T)
        if metric == "cosine"
        else torch.cdist(x[None], x[None], compute_mode="donot_use_mm_for_euclid_dist")[0]
    )
    free = [j for j in range(n) if mask is None or mask[j]]
    picks: list[int] = []
    values: list[float] = []
    margin = math.inf
    for step in range(k):
        if step == 0 and start == "isolated":
            score = {j: min((float(distance[j, i]) for i in free if i != j), default=math.inf) for j in free}
        elif step == 0 and start == "norm":
            score = {j: float(x[j].norm()) for j in free}
        elif step == 0:
            score = {j: float(j == (free[0] if first is None else first)) for j in free}
        else:
            combine = min if objective == "max_min" else sum
            score = {j: float(combine(float(distance[i, j]) for i in picks)) for j in free}
        ranked = sorted(score.values(), reverse=True)
        if len(ranked) > 1:
            margin = min(margin, (ranked[0] - ranked[1]) / max(1.0, abs(ranked[0])))
        best = min(j for j in free if score[j] == ranked[0])
        values.append(score[best] if step > 0 or start == "isolated" else math.inf)
        picks.append(best)
        free.remove(best)
    return picks, values, margin


def arguments(
    x: Tensor,
    k: int,
    metric: str = "cosine",
    objective: str = "max_min",
    start: str = "isolated",
    mask: Tensor | None = None,
    candidates_scored: int = 0,
) -> tuple:
    """The flat arguments of the op; a given start is the last token that may be picked."""
    first = None
    if start == "given":
        allowed = torch.ones(x.shape[:2]) if mask is None else mask.float()
        first = (allowed * torch.arange(1, x.shape[1] + 1)).argmax(1)
    return x, k, metric, objective, start, first, mask, candidates_scored


def assert_same_picks(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...], name: str = "") -> None:
    for part, first, second in zip(("index", "distance"), got, wanted, strict=True):
        assert_same(first, second, f"{name}: {part}")


def clustered(batch: int, n: int, width: int, groups: int) -> Tensor:
    """Tokens around a few centres, so near that screening in low precision cannot tell them apart."""
    centres = torch.randn(batch, groups, width)
    which = torch.randint(groups, (batch, n, 1)).expand(-1, -1, width)
    return centres.gather(1, which) + 1e-3 * torch.randn(batch, n, width)


INPUTS = {
    "random": lambda: torch.randn(2, 70, 40),
    "odd-width": lambda: torch.randn(2, 67, 33),
    "one-channel": lambda: torch.randn(2, 20, 1),
    "signs": lambda: signs(2, 45, 16),
    "signs-of-five": lambda: signs(2, 40, 5),
    "clustered": lambda: clustered(2, 90, 48, 4),
    "duplicates": lambda: torch.randn(2, 12, 24).repeat(1, 4, 1),
    "all-equal": lambda: torch.randn(1, 1, 19).expand(2, 50, 19),
    "zeros": lambda: torch.zeros(2, 11, 6),
    "some-zero": lambda: torch.randn(2, 40, 12) * torch.randint(0, 2, (2, 40, 1)),
    "opposite": lambda: torch.cat([torch.ones(1, 9, 7), -torch.ones(1, 9, 7)], 1),
    "nan-tokens": lambda: torch.where(torch.rand(3, 41, 1) < 0.3, math.nan, torch.randn(3, 41, 20)),
    "one-nan-element": lambda: torch.randn(2, 30, 33).index_put(
        (torch.tensor(1), torch.tensor(4), torch.tensor(31)), torch.tensor(math.nan)
    ),
    "infinite": lambda: torch.randn(1, 20, 8) * torch.tensor([1.0, math.inf, 1.0, -math.inf]).repeat(5)[None, :, None],
    "all-nan": lambda: torch.full((2, 9, 4), math.nan),
    "huge-and-tiny": lambda: torch.randn(2, 24, 16) * torch.tensor([2.0**100, 2.0**-60, 1.0]).repeat(8)[None, :, None],
    "subnormal": lambda: torch.randn(2, 15, 16) * 2.0**-135,
    "largest": lambda: signs(2, 15, 16) * torch.finfo(torch.float32).max,
    "outliers": lambda: torch.randn(2, 50, 64) * torch.where(torch.arange(64) == 7, 1000.0, 1.0) + 3,
    "one-token": lambda: torch.randn(2, 1, 4),
    "two-tokens": lambda: torch.randn(2, 2, 4),
    "no-channel": lambda: torch.zeros(2, 5, 0),
    "no-token": lambda: torch.randn(2, 0, 4),
    "no-sample": lambda: torch.randn(0, 6, 4),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("metric", METRICS)
@over_backends("k_center", without=("reference",))
def test_same_bits_as_the_specification(backend: Backend, metric: str, objective: str, dtype: torch.dtype) -> None:
    for which, (name, make) in enumerate(INPUTS.items()):
        x = make().to(dtype)
        n = x.shape[1]
        on_host = backend.name == "cuda-on-host"  # a hundred times as slow: one start and one k for each input
        for start in STARTS[which % 4 :][:1] if on_host else STARTS:
            if n == 0 and start == "given":
                continue
            for k in [min(n, 10)] if on_host else sorted({min(1, n), n // 3, n}):
                args = arguments(x, k, metric, objective, start)
                assert_same_picks(backend.k_center(*args), reference.k_center_picks(*args), f"{name}, {start}, k={k}")


@pytest.mark.parametrize("start", STARTS)
@over_backends("k_center", without=("reference",))
def test_masks(backend: Backend, start: str) -> None:
    for x in (torch.randn(3, 50, 24), clustered(3, 50, 24, 3), torch.ones(3, 50, 2)):
        x[1, ::7] = math.nan
        mask = torch.rand(3, 50) < 0.6
        mask[2] = torch.arange(50) == 33
        for metric in METRICS:
            # More than there are: the rest is -1.
            for k in (20,) if backend.name == "cuda-on-host" else (1, 20, 50):
                args = arguments(x, k, metric, "max_min", start, mask)
                got = backend.k_center(*args)
                assert_same_picks(got, reference.k_center_picks(*args), f"{metric}, k={k}")
                for b in range(3):
                    real = got[0][b][got[0][b] >= 0]
                    assert len(real) == min(k, int(mask[b].sum()))
                    assert len(set(real.tolist())) == len(real)
                    assert bool(mask[b, real].all())


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("metric", METRICS)
@over_backends("k_center")
def test_random_tokens_match_the_oracle(backend: Backend, metric: str, objective: str, start: str) -> None:
    compared = 0
    for seed in range(30):
        x = torch.randn(1, 23, 12, generator=torch.Generator().manual_seed(seed))
        mask = torch.rand(1, 23, generator=torch.Generator().manual_seed(seed)) < 0.8
        mask[0, 22] = True
        k = 9
        first = 22 if start == "given" else None
        picks, values, margin = oracle(x[0], k, metric, objective, start, first, mask[0])
        if margin < 1e-5:
            continue
        index, distance = backend.k_center(*arguments(x, k, metric, objective, start, mask))
        assert index[0].tolist() == picks
        assert_accurate(distance[0], torch.tensor(values, dtype=torch.float64), torch.tensor(values))
        compared += 1
        if compared == 4:
            return
    assert compared, "every seed was too close to call: choose another shape"


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@over_backends("k_center")
def test_exact_ties_go_to_the_lowest_index(backend: Backend, metric: str, objective: str) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        # Exact in every step: cosines of four signs, distances on a line.
        x = signs(1, 30, 4) if metric == "cosine" else torch.randint(-9, 10, (1, 30, 1)).float()
        for start in ("isolated", "first"):
            picks, values, _ = oracle(x[0], 30, metric, objective, start)
            index, distance = backend.k_center(*arguments(x, 30, metric, objective, start))
            assert index[0].tolist() == picks
            assert distance[0].tolist() == values


def test_by_hand() -> None:
    # On a circle, by angle: 0 and 10 are close, 90 and 100 too, 200 is alone.
    angles = torch.deg2rad(torch.tensor([0.0, 10.0, 90.0, 100.0, 200.0]))
    x = torch.stack([angles.cos(), angles.sin()], 1)[None]
    index, distance = fastok.k_center(x, 3)
    # 200 is 100 degrees from its nearest; then 10 is 170 from it (0 only 160, the other way), then 100 is 90 from 10.
    assert index.tolist() == [[4, 1, 3]]
    expected = 1 - torch.deg2rad(torch.tensor([100.0, 170.0, 90.0])).cos()
    torch.testing.assert_close(distance[0], expected, rtol=0, atol=1e-6)
    index, _ = fastok.k_center(x, 3, start=2)
    # From 90 degrees: 200 is 110 away; then 0 is 90 away, 10 is 80.
    assert index.tolist() == [[2, 4, 0]]
    line = torch.tensor([0.0, 1.0, 5.0, 9.0])[None, :, None]
    index, distance = fastok.k_center(line, 4, metric="euclidean", start="first")
    assert index.tolist() == [[0, 3, 2, 1]]
    assert distance.tolist() == [[math.inf, 9.0, 4.0, 1.0]]
    index, distance = fastok.k_center(line, 4, metric="euclidean", objective="max_sum", start="norm")
    assert index.tolist() == [[3, 0, 1, 2]]
    assert distance.tolist() == [[math.inf, 9.0, 9.0, 13.0]]


@given(
    batch=st.integers(0, 3),
    n=st.integers(1, 50),
    width=st.integers(1, 70),
    share=st.floats(0, 1),
    metric=st.sampled_from(METRICS),
    objective=st.sampled_from(OBJECTIVES),
    start=st.sampled_from(STARTS),
    masked=st.booleans(),
    kind=st.sampled_from(["random", "signs", "clustered", "nan"]),
    candidates_scored=st.sampled_from([0, 1, 5, 32, 100]),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(DTYPES),
)
@over_backends("k_center", without=("reference", "cuda", "cuda-on-host"))
def test_any_arguments_match_the_specification(
    backend: Backend, batch, n, width, share, metric, objective, start, masked, kind, candidates_scored, seed, dtype
) -> None:
    torch.manual_seed(seed)
    x = clustered(batch, n, width, 3) if kind == "clustered" else torch.randn(batch, n, width)
    if kind == "signs":
        x = signs(batch, n, width)
    if kind == "nan":
        x = torch.where(torch.rand(batch, n, 1) < 0.2, math.nan, x)
    mask = torch.rand(batch, n) < 0.7 if masked else None
    args = arguments(x.to(dtype), round(share * n), metric, objective, start, mask, candidates_scored)
    assert_same_picks(backend.k_center(*args), reference.k_center_picks(*args))


@pytest.mark.parametrize("candidates_scored", [0, 1, 3, 64])
@pytest.mark.parametrize("start", ["isolated", "first"])
@over_backends("k_center", without=("reference", "cuda-on-host"))
def test_every_plan_gives_the_same_picks(backend: Backend, start: str, candidates_scored: int) -> None:
    for x in (torch.randn(1, 300, 96), clustered(1, 300, 96, 5), torch.randn(1, 300, 96).to(torch.bfloat16)):
        for k in (1, 7, 60):
            args = arguments(x, k, "cosine", "max_min", start, None, candidates_scored)
            assert_same_picks(backend.k_center(*args), reference.k_center_picks(*args), f"k={k}")


@over_backends("k_center", without=("reference", "cuda-on-host"))
def test_some_tokens_too_close_to_call(backend: Backend) -> None:
    args = arguments(torch.cat([clustered(1, 600, 40, 30), torch.randn(1, 500, 40)], 1), 60)
    assert_same_picks(backend.k_center(*args), reference.k_center_picks(*args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over_backends("k_center", without=("reference",))
def test_strided_and_misaligned_views(backend: Backend, dtype: torch.dtype) -> None:
    for view in (
        odd_view(torch.randn(3, 35, 61).to(dtype)),
        torch.randn(2, 16, 30).to(dtype).mT,
        torch.randn(1, 30, 9).to(dtype).expand(3, -1, -1),
        torch.randn(30, 2, 20).to(dtype).transpose(0, 1),
    ):
        mask = (torch.rand(view.shape[1], view.shape[0]) < 0.8).T
        for metric in METRICS:
            args = arguments(view, 9, metric, "max_min", "isolated", mask)
            assert_same_picks(backend.k_center(*args), reference.k_center_picks(*args))


@over_backends("k_center", without=("reference", "cuda-on-host"))
def test_batch_invariant_whatever_the_threads(backend: Backend) -> None:
    x = torch.randn(5, 131, 48)
    whole = backend.k_center(*arguments(x, 40))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_same_picks(backend.k_center(*arguments(x, 40)), whole)
            for b in range(5):
                alone = backend.k_center(*arguments(x[b : b + 1], 40))
                assert_same_picks(alone, tuple(part[b : b + 1] for part in whole))
    finally:
        torch.set_num_threads(before)


def test_planner() -> None:
    native = pytest.importorskip("fastok._native")
    plan = native.plan_k_center
    # All products where the isolated start needs them anyway and they fit; else by batches of candidates.
    assert plan(576, 1024, 58) == ("gram", 576, True)
    assert plan(2880, 4096, 288) == ("gram", 2880, True)
    assert plan(16384, 3584, 1024) == ("batches", 64, True)
    assert plan(65536, 1152, 4096) == ("batches", 64, True)
    assert plan(576, 1024, 58, start="first") == ("batches", 64, False)
    assert plan(576, 1024, 200, start="first") == ("gram", 576, False)
    assert plan(576, 1024, 4, start="first") == ("exact", 64, False)
    # Sums of distances: exactly by tile products, where the machine has them.
    assert plan(576, 4096, 64, objective="max_sum", start="first", tiles=True) == ("tiles", 576, False)
    assert plan(2880, 4096, 288, objective="max_sum", tiles=True) == ("tiles", 2880, False)
    assert plan(576, 4096, 8, objective="max_sum", start="first", tiles=True) == ("exact", 64, False)
    assert plan(16384, 1024, 1024, objective="max_sum", tiles=True) == ("exact", 64, True)
    assert plan(576, 1024, 58, metric="euclidean", objective="max_sum", tiles=True) == ("exact", 64, False)
    assert plan(576, 1024, 58, tiles=True) == ("gram", 576, True)
    # As the caller says.
    assert plan(576, 1024, 58, candidates_scored=1) == ("exact", 64, True)
    assert plan(576, 1024, 58, candidates_scored=7) == ("batches", 7, True)
    assert plan(5, 1024, 3, candidates_scored=7) == ("batches", 5, True)
    # What is not screened.
    assert plan(576, 1024, 58, objective="max_sum") == ("exact", 64, True)
    assert plan(576, 1024, 58, metric="euclidean") == ("exact", 64, False)


def test_permuted_tokens_give_permuted_picks() -> None:
    x = torch.randn(1, 200, 64)
    order = torch.randperm(200)
    index, distance = fastok.k_center(x, 50)
    permuted_index, permuted_distance = fastok.k_center(x[:, order], 50)
    assert_same(order[permuted_index[0]], index[0])
    assert_same(permuted_distance, distance)


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**30])
def test_cosine_picks_do_not_depend_on_length(factor: float) -> None:
    x = torch.randn(1, 100, 32)
    length = factor ** torch.randint(0, 2, (1, 100, 1)).float()
    assert_same_picks(fastok.k_center(x * length, 30), fastok.k_center(x, 30))


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"k": 9}, ValueError, r"k must be within \[0, N=8\], got 9"),
        ({"k": -1}, ValueError, "k must be within"),
        ({"k": 2.0}, TypeError, "k must be an int"),
        ({"metric": "dot"}, ValueError, "metric must be one of cosine, euclidean; got 'dot'"),
        ({"objective": "min"}, ValueError, "objective must be one of"),
        ({"start": "last"}, ValueError, "start must be one of isolated, norm, first"),
        ({"start": 8}, ValueError, r"start must be within \[0, N=8\), got 8"),
        ({"start": -1}, ValueError, "start must be within"),
        ({"start": 1.5}, TypeError, "start must be an int"),
        ({"start": torch.tensor([0, 8])}, ValueError, r"start must be within \[0, 8\), got 8"),
        ({"start": torch.tensor([0.0, 1.0])}, TypeError, "start must be an integer"),
        ({"start": torch.tensor([0])}, ValueError, "start must have shape"),
        ({"mask": torch.ones(2, 7, dtype=torch.bool)}, ValueError, "mask must have shape"),
        ({"mask": torch.ones(2, 8)}, TypeError, "mask must have dtype bool"),
        ({"mask": torch.arange(8).lt(2).expand(2, 8), "k": 3}, ValueError, "k must be at most .* 2 in sample 0; got 3"),
        (
            {"mask": torch.arange(8).gt(0).expand(2, 8), "start": 0},
            ValueError,
            "start must be a token that mask allows",
        ),
        ({"candidates_scored": 0}, ValueError, "candidates_scored must be at least 1"),
        ({"candidates_scored": 1.0}, TypeError, "candidates_scored must be an int"),
        ({"x": torch.ones(2, 8, 4, dtype=torch.int64)}, TypeError, "x must have dtype"),
        ({"x": torch.ones(8, 4)}, ValueError, "x must be"),
    ],
)
def test_bad_arguments(kwargs: dict, error: type[Exception], text: str) -> None:
    given_arguments = {"x": torch.randn(2, 8, 4), "k": 2} | kwargs
    with pytest.raises(error, match=text):
        fastok.k_center(given_arguments.pop("x"), given_arguments.pop("k"), **given_arguments)


def test_public_function_agrees_with_its_specification() -> None:
    x = torch.randn(2, 40, 16)
    mask = torch.rand(2, 40) < 0.9
    mask[:, 3] = True
    for start in ("isolated", "norm", "first", 3, torch.tensor([3, 3])):
        got = fastok.k_center(x, 10, start=start, mask=mask, candidates_scored=4)
        assert_same_picks(got, reference.k_center(x, 10, start=start, mask=mask))
    before = x.clone()
    fastok.k_center(x.requires_grad_(), 10)
    assert_same(x.detach(), before)


@pytest.mark.parametrize("start", ["isolated", "given"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(start: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 30, 24).to(dtype)
    mask = torch.rand(2, 30) < 0.8
    torch.library.opcheck(torch.ops.fastok.k_center, arguments(x, 7, "cosine", "max_min", start, mask))


def test_compiles_without_recompilation() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, mask: fastok.k_center(x, 5, start=2, mask=mask), fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (20, 33, 47):
            x, mask = torch.randn(2, n, 16), torch.ones(2, n, dtype=torch.bool)
            assert_same_picks(compiled(x, mask), fastok.k_center(x, 5, start=2, mask=mask))
