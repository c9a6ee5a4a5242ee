"""top_tokens and sample_cdf against brute force and the specification, on every backend."""

import math
from bisect import bisect_left
from fractions import Fraction
from itertools import accumulate

import fastok
import pytest
import torch
from fastok import reference
from fastok.testing import Backend, assert_same, over_backends
from fastok.testing.examples.select import integers, odd_rows
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# ---- top_tokens: brute force -----------------------------------------------------------------------------------------


def best_tokens(
    scores: list[float], k: list[int], protect: int, mask: list[bool], segments: list[int], by_score: bool
) -> list[int]:
    """One sample, by sorting Python lists."""
    free = range(protect, len(scores))
    allowed = [i for i in free if mask[i] and 0 <= segments[i] < len(k)]
    ranked = sorted((i for i in allowed if scores[i] == scores[i]), key=lambda i: (-scores[i], i))
    chosen: list[int] = []
    for segment, budget in enumerate(k):
        chosen += [i for i in ranked if segments[i] == segment][:budget]
    spare = [i for i in ranked if i not in chosen]
    unscored = [i for i in allowed if scores[i] != scores[i]]
    masked = [i for i in free if i not in allowed]
    picked = (chosen + spare + unscored + masked)[: sum(k)]
    if not by_score:
        return [*range(protect), *sorted(picked)]
    return [*range(protect)] + [i for i in ranked + unscored + masked if i in picked]


def check_top_tokens(backend: Backend, scores: Tensor, k: list[int], protect=0, mask=None, segments=None) -> None:
    batch, n = scores.shape
    everything = torch.ones(batch, n, dtype=torch.bool) if mask is None else mask
    one = torch.zeros(batch, n, dtype=torch.int64) if segments is None else segments
    for by_score in (False, True):
        got = backend.top_tokens(scores, k, protect, mask, segments, by_score)
        rows = [
            best_tokens(scores[b].float().tolist(), k, protect, everything[b].tolist(), one[b].tolist(), by_score)
            for b in range(batch)
        ]
        assert_same(got, torch.tensor(rows, dtype=torch.int64).view(batch, protect + sum(k)), f"by_score={by_score}")


SCORES = {
    "random": lambda: torch.randn(3, 150),
    "ties": lambda: integers(3, 150),
    "nan": lambda: integers(3, 150, nan=0.5),
    "all-nan": lambda: torch.full((2, 40), math.nan),
    "all-equal": lambda: torch.ones(2, 70),
    "signed-zeros": lambda: torch.zeros(2, 50).copysign(torch.randn(2, 50)),
    "infinite": lambda: torch.tensor([math.inf, -math.inf, 0.0, math.nan]).repeat(2, 9),
    "all-minus-infinite": lambda: torch.full((2, 33), -math.inf),
    "tiny": lambda: torch.randint(-3, 4, (2, 60)) * 2.0**-149,
    "one-token": lambda: torch.randn(3, 1),
    "no-token": lambda: torch.randn(3, 0),
    "no-sample": lambda: torch.randn(0, 7),
    "last-bit": lambda: (torch.tensor(0x3F800000, dtype=torch.int32) + torch.randperm(90)).view(torch.float32)[None],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over_backends("top_tokens")
def test_top_tokens(backend: Backend, dtype: torch.dtype) -> None:
    for make in SCORES.values():
        scores = make().to(dtype)
        n = scores.shape[1]
        for protect in {0, min(2, n), n}:
            for k in {0, min(1, n - protect), (n - protect) // 3, n - protect}:
                check_top_tokens(backend, scores, [k], protect)


@over_backends("top_tokens")
def test_top_tokens_masked(backend: Backend) -> None:
    for share in (0.0, 0.1, 0.6, 1.0):
        scores = integers(4, 90, nan=0.1)
        mask = torch.rand(4, 90) < share
        for protect in (0, 3):
            check_top_tokens(backend, scores, [40], protect, mask)
            check_top_tokens(backend, scores[:, ::2], [12], protect, mask.mT.contiguous().mT[:, ::2])


@over_backends("top_tokens")
def test_top_tokens_of_segments(backend: Backend) -> None:
    scores = integers(3, 120, nan=0.1)
    for segments, k in (
        (torch.arange(120).expand(3, 120) // 30, [5, 0, 30, 8]),  # in order, one without a budget, one kept whole
        (torch.randint(0, 5, (3, 120)), [9, 9, 9, 9, 9]),
        (torch.randint(0, 5, (3, 120)), [60, 1, 0, 20, 30]),  # too short for its budget
        (torch.randint(0, 3, (3, 120)) * 2, [4, 7, 8, 9, 10]),  # empty segments
        (torch.randint(-2, 9, (3, 120)), [10, 10, 10]),  # tokens of no segment
        (torch.full((3, 120), -1), [10, 20]),
        (torch.randint(-(2**40), 2**40, (3, 120)), [3, 4]),
        (torch.zeros(3, 120, dtype=torch.int64), [0, 0]),
        (torch.zeros(3, 120, dtype=torch.int64), []),
    ):
        check_top_tokens(backend, scores, k, 0, None, segments)
        check_top_tokens(backend, scores, k, 1, torch.rand(3, 120) < 0.7, segments)


@given(
    batch=st.integers(0, 3), n=st.integers(0, 70), protect=st.integers(0, 9), budgets=st.lists(st.integers(0, 20)),
    share=st.none() | st.sampled_from([0.2, 0.9]), nan=st.sampled_from([0.0, 0.3]), seed=st.integers(0, 1000),
    dtype=st.sampled_from(DTYPES),
)  # fmt: skip
@over_backends("top_tokens", without=("cuda",))
def test_top_tokens_of_any_arguments(backend: Backend, batch, n, protect, budgets, share, nan, seed, dtype) -> None:
    torch.manual_seed(seed)
    protect = min(protect, n)
    k: list[int] = []
    for budget in budgets:
        k.append(min(budget, n - protect - sum(k)))
    mask = None if share is None else torch.rand(batch, n) < share
    scores, segments = integers(batch, n, nan=nan).to(dtype), torch.randint(-1, len(k) + 1, (batch, n))
    check_top_tokens(backend, scores, k, protect, mask, segments)
    check_top_tokens(backend, scores, [sum(k)], protect, mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over_backends("top_tokens")
def test_top_tokens_of_long_rows(backend: Backend, dtype: torch.dtype) -> None:
    on_host = backend.name == "cuda-on-host"
    for make in (torch.randn, torch.rand, integers):
        scores = make(2, 5000).to(dtype)
        for k, by_score in ((1, False), (900, False), (900, True), (4900, False), (4900, True)):
            if on_host and k == 4900 and (make != integers or dtype != torch.float32):
                continue  # slow there
            got = backend.top_tokens(scores, [k], 0, None, None, by_score)
            wanted = scores.float().argsort(dim=1, descending=True, stable=True)[:, :k]
            assert_same(got, wanted if by_score else wanted.sort(1).values, f"k={k}, by_score={by_score}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over_backends("top_tokens")
def test_top_tokens_of_views(backend: Backend, dtype: torch.dtype) -> None:
    scores = integers(3, 77, nan=0.1).to(dtype)
    wide = torch.full((3, 120), math.nan, dtype=dtype)
    for offset in range(12):
        view = wide[:, offset : offset + 77]
        view.copy_(scores)
        check_top_tokens(backend, view, [30], 1)
        wide.fill_(math.nan)
    check_top_tokens(backend, odd_rows(scores), [30], 1)
    check_top_tokens(backend, scores.mT.contiguous().mT, [30], 1)
    check_top_tokens(backend, scores[:1].expand(3, 77), [30], 1)


@over_backends("top_tokens")
def test_top_tokens_do_not_depend_on_the_batch(backend: Backend) -> None:
    scores, mask = torch.randn(5, 700), torch.rand(5, 700) < 0.8
    segments = torch.randint(0, 4, (5, 700))
    for args in (([99], 1, mask, None, False), ([40, 50, 0, 60], 1, mask, segments, False)):
        k, protect, allowed, of, by_score = args
        whole = backend.top_tokens(scores, k, protect, allowed, of, by_score)
        assert_same(backend.top_tokens(scores, *args), whole)
        for b in range(5):
            row = slice(b, b + 1)
            parts = (scores[row], k, protect, allowed[row], None if of is None else of[row], by_score)
            assert_same(backend.top_tokens(*parts), whole[row])


def test_kept_tokens_make_a_map() -> None:
    scores = torch.tensor([[9.0, 1.0, 3.0, 2.0, 3.0], [0.0, math.nan, -math.inf, math.nan, -5.0]])
    index = fastok.top_tokens(scores, 2, protect=1)
    assert index.tolist() == [[0, 2, 4], [0, 2, 4]]
    assert fastok.TokenMap.keep(index, 5).counts.tolist() == [3, 3]
    assert fastok.top_tokens(scores, 3, protect=1, order="score").tolist() == [[0, 2, 4, 3], [0, 4, 2, 1]]
    frames = torch.tensor([0, 0, 0, 1, 1]).expand(2, 5)
    for budgets in ([1, 2], (1, 2), torch.tensor([1, 2])):
        assert fastok.top_tokens(scores, budgets, segments=frames).tolist() == [[0, 3, 4], [0, 2, 4]]
    assert_same(index, reference.top_tokens(scores, 2, protect=1))
    assert_same(
        fastok.top_tokens(scores, [1, 2], segments=frames, order="score"),
        reference.top_tokens(scores, [1, 2], segments=frames, order="score"),
    )


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"k": -1}, ValueError, "k must be >= 0, got -1"),
        ({"k": 7}, ValueError, "k must be at most N - protect = 6 in total, got 7"),
        ({"k": 6, "protect": 1}, ValueError, "N - protect = 5"),
        ({"k": 1.0}, TypeError, "k must be an int, got float"),
        ({"k": True}, TypeError, "k must be an int"),
        ({"k": [1, 2]}, ValueError, "k must be an int without segments"),
        ({"k": 2, "segments": torch.zeros(2, 6).long()}, ValueError, "k must have a budget for each segment"),
        ({"k": [1, -2], "segments": torch.zeros(2, 6).long()}, ValueError, r"k must be >= 0, got \[1, -2\]"),
        ({"k": [4, 3], "segments": torch.zeros(2, 6).long()}, ValueError, "in total"),
        ({"k": [1, 2.0], "segments": torch.zeros(2, 6).long()}, TypeError, "k must be an int, got float"),
        ({"k": torch.ones(2), "segments": torch.zeros(2, 6).long()}, TypeError, "integer tensor"),
        ({"k": torch.ones(2, 1).long(), "segments": torch.zeros(2, 6).long()}, ValueError, "k must have shape"),
        ({"k": "all", "segments": torch.zeros(2, 6).long()}, TypeError, "k must be an int, got str 'all'"),
        ({"k": [1], "segments": torch.zeros(2, 5).long()}, ValueError, "segments must have shape"),
        ({"k": [1], "segments": torch.zeros(2, 6)}, TypeError, "segments must have dtype int64"),
        ({"protect": 7}, ValueError, r"protect must be within \[0, N=6\], got 7"),
        ({"protect": 1.0}, TypeError, "protect must be an int"),
        ({"mask": torch.ones(2, 6)}, TypeError, "mask must have dtype bool"),
        ({"mask": torch.ones(6, dtype=torch.bool)}, ValueError, "mask must have shape"),
        ({"mask": torch.ones(2, 6, dtype=torch.bool, device="meta")}, ValueError, "same device"),
        ({"order": "best"}, ValueError, "'best'"),
        ({"scores": torch.ones(2, 6, dtype=torch.int64)}, TypeError, "scores must have dtype"),
        ({"scores": torch.ones(6)}, ValueError, r"scores must be \[B,N\]"),
    ],
)
def test_top_tokens_bad_arguments(kwargs: dict, error: type[Exception], text: str) -> None:
    arguments = {"scores": torch.randn(2, 6), "k": 2} | kwargs
    with pytest.raises(error, match=text):
        fastok.top_tokens(arguments.pop("scores"), arguments.pop("k"), **arguments)


# ---- sample_cdf ------------------------------------------------------------------------------------------------------


def sampled(scores: list[float], k: int, protect: int) -> list[int]:
    """Adaptive token sampling of one sample as published (spec_vit §5), in exact arithmetic: tokens in slot order."""
    free = [i for i in range(protect, len(scores)) if scores[i] == scores[i]]
    largest = torch.finfo(torch.float32).max
    weight = {i: int(min(max(scores[i], 0.0), largest) * Fraction(2) ** 149) for i in free}
    ranked = sorted(free, key=lambda i: (weight[i], i))
    if len(ranked) > 1 and not any(weight.values()):
        weight = dict.fromkeys(free, 1)
    if not ranked or k <= protect:
        return [*range(protect)]
    # The cumulative distribution and the heights, both times spread * intervals.
    intervals = max(k - protect - 1, 1)
    cumulative = list(accumulate(weight[i] for i in ranked))
    level = [(total - cumulative[0]) * intervals for total in cumulative]
    low, high = min((f for f in level if f > 0), default=0), level[-1]
    picks: set[int] = set()
    for step in range(k - protect):
        height = low + (high - low) // intervals * step
        above = bisect_left(level, height)
        picks.add(min(range(max(above - 1, 0), above + 1), key=lambda place: abs(level[place] - height)))
    return [*range(protect)] + [ranked[place] for place in sorted(picks)]


def check_map(got: tuple[Tensor, ...], rows: list[list[int]], n: int, n_out: int, name: str = "") -> None:
    """``got`` is the map that keeps the tokens of ``rows`` in that order."""
    assign = torch.full((len(rows), n), -1, dtype=torch.int32)
    for b, row in enumerate(rows):
        assign[b, row] = torch.arange(len(row), dtype=torch.int32)
    counts = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    wanted = (assign, counts, *reference.build_map(assign, n_out))
    for part, first, second in zip(("assign", "counts", "offsets", "members"), got, wanted, strict=True):
        assert_same(first, second, f"{name}: {part}")


SIGNIFICANCE = {
    "random": lambda: torch.rand(3, 97),
    "attention": lambda: (torch.randn(3, 97) * 2).softmax(1),
    "peaked": lambda: (torch.randn(3, 50) * 20).softmax(1),
    "equal": lambda: torch.ones(2, 33),
    "half-zero": lambda: torch.rand(3, 60) * torch.randint(0, 2, (3, 60)),
    "negative": lambda: torch.randn(3, 41),
    "zeros": lambda: torch.zeros(2, 21),
    "nan": lambda: torch.where(torch.rand(4, 40) < 0.4, math.nan, torch.rand(4, 40)),
    "zeros-and-nan": lambda: torch.tensor([0.0, math.nan, 0.0, 0.0, math.nan, 0.0])[None],
    "one-and-nan": lambda: torch.tensor([[math.nan, 2.0, math.nan], [math.nan, 0.0, math.nan]]),
    "all-nan": lambda: torch.full((2, 9), math.nan),
    "infinite": lambda: torch.tensor([math.inf, 1.0, 3e38, 0.0, math.inf, 2e38])[None],
    "one-token": lambda: torch.tensor([[3.0], [0.0]]),
    "no-token": lambda: torch.zeros(2, 0),
    "no-sample": lambda: torch.zeros(0, 5),
    "far-apart": lambda: 2.0 ** -torch.arange(0.0, 120.0, 3.0)[torch.randperm(40)][None],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over_backends("sample_cdf")
def test_sample_cdf(backend: Backend, dtype: torch.dtype) -> None:
    for name, make in SIGNIFICANCE.items():
        scores = make().to(dtype)
        batch, n = scores.shape
        for protect in {0, min(1, n), n}:
            for k in {protect, protect + 1, protect + 2, max(protect, n // 2), n, 2 * n + 3}:
                got = backend.sample_cdf(scores, k, protect)
                rows = [sampled(scores[b].double().tolist(), k, protect) for b in range(batch)]
                check_map(got, rows, n, min(k, n), f"{name}, k={k}, protect={protect}")


@over_backends("sample_cdf")
def test_sample_cdf_of_more_heights_than_tokens(backend: Backend) -> None:
    """Against every height one by one."""
    for name, make in SIGNIFICANCE.items():
        scores = make()
        n = scores.shape[1]
        for k in (n + 1, 700):
            rows = [sampled(row.double().tolist(), k, min(n, 1)) for row in scores]
            check_map(backend.sample_cdf(scores, k, min(n, 1)), rows, n, min(k, n), f"{name}, k={k}")


@over_backends("sample_cdf")
def test_sample_cdf_never_takes_heights_one_by_one(backend: Backend) -> None:
    scores = torch.stack([torch.randperm(200), torch.randperm(200)]).float() + 1
    rows = [[0, *(int(i) for i in row.argsort() if i != 0)] for row in scores]
    for row in rows:
        del row[1]  # the least significant of all but token 0
    check_map(backend.sample_cdf(scores, 10**12, 1), rows, 200, 200)


@given(
    batch=st.integers(0, 3), n=st.integers(0, 60), k=st.integers(0, 130), protect=st.integers(0, 5),
    nan=st.sampled_from([0.0, 0.3]), seed=st.integers(0, 1000), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
@over_backends("sample_cdf", without=("reference", "cuda"))
def test_sample_cdf_of_any_arguments(backend: Backend, batch, n, k, protect, nan, seed, dtype) -> None:
    torch.manual_seed(seed)
    protect = min(protect, n, k)
    args = (integers(batch, n, nan=nan).to(dtype), k, protect)
    for got, wanted in zip(backend.sample_cdf(*args), reference.sample_map(*args), strict=True):
        assert_same(got, wanted)


@over_backends("sample_cdf", without=("reference",))
def test_sample_cdf_of_long_rows_and_views(backend: Backend) -> None:
    for scores in (torch.rand(2, 5000), integers(2, 5000, nan=0.1), torch.rand(2, 5000).pow(30)):
        for view in (scores, odd_rows(scores), scores.mT.contiguous().mT, scores.bfloat16()):
            args = (view, 3000, 2)
            whole = backend.sample_cdf(*args)
            for got, wanted in zip(whole, reference.sample_map(*args), strict=True):
                assert_same(got, wanted)
        alone = backend.sample_cdf(scores[1:], 3000, 2)
        for got, wanted in zip(alone, backend.sample_cdf(scores, 3000, 2), strict=True):
            assert_same(got, wanted[1:])


def test_sample_cdf_worked_example() -> None:
    # Unprotected scores 1 2 3 4 in rank order: sums 1 3 6 10, F = 0 2 5 9 (of 9). Five heights from 2 to 9: 2, 3.75,
    # 5.5, 7.25, 9 pick F = 2, 5, 5, 9, 9: the tokens of score 2, 3 and 4.
    scores = torch.tensor([[7.0, 4.0, 1.0, 3.0, 2.0]])
    token_map = fastok.sample_cdf(scores, 6, protect=1)
    assert token_map.assign.tolist() == [[0, 3, -1, 2, 1]]
    assert token_map.counts.tolist() == [4]
    assert token_map.n_out == 5
    assert token_map.representative.tolist() == [[0, 4, 3, 1, -1]]
    assert_same(token_map.assign, reference.sample_cdf(scores, 6, protect=1).assign)


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"k": 0}, ValueError, "k must be at least protect=1"),
        ({"k": 2.0}, TypeError, "k must be an int"),
        ({"protect": 7}, ValueError, r"protect must be within \[0, N=6\], got 7"),
        ({"protect": -1}, ValueError, "protect must be within"),
        ({"scores": torch.ones(2, 6, dtype=torch.float64)}, TypeError, "scores must have dtype"),
        ({"scores": torch.ones(2, 6, 1)}, ValueError, r"scores must be \[B,N\]"),
    ],
)
def test_sample_cdf_bad_arguments(kwargs: dict, error: type[Exception], text: str) -> None:
    arguments = {"scores": torch.rand(2, 6), "k": 2, "protect": 1} | kwargs
    with pytest.raises(error, match=text):
        fastok.sample_cdf(arguments.pop("scores"), arguments.pop("k"), **arguments)


# ---- torch integration -----------------------------------------------------------------------------------------------


def test_opcheck() -> None:
    ops = torch.ops.fastok
    scores = torch.randn(2, 13, requires_grad=True)
    segments, mask = torch.randint(0, 3, (2, 13)), torch.rand(2, 13) < 0.5
    for args in (
        (scores, [4], 1, None, None, False),
        (scores, [1, 2, 3], 0, mask, segments, True),
        (scores.half(), [0], 0, mask, None, False),
    ):
        torch.library.opcheck(ops.top_tokens.default, args)
    torch.library.opcheck(ops.sample_cdf.default, (scores, 7, 1))
    torch.library.opcheck(ops.sample_cdf.default, (scores.bfloat16(), 20, 0))
    torch.library.opcheck(ops.density_peaks.default, (torch.randn(2, 9, 4, requires_grad=True), 3, 2))


def test_compiles_without_graph_break_or_recompilation() -> None:
    compilations = 0

    def counting(graph, inputs):
        nonlocal compilations
        compilations += 1
        return graph

    def step(scores: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        n = scores.shape[1]
        index = fastok.top_tokens(scores, n // 2, protect=1)
        frames = (torch.arange(n) // 5).expand(2, n)
        framed = fastok.top_tokens(scores, [2, 1, 3], segments=frames)
        token_map = fastok.sample_cdf(scores.exp(), n - 2, protect=1)
        centres = fastok.density_peaks(x, 4, neighbors=3)
        return index, framed, token_map.merge(x)[0], centres

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counting)
    for n in (20, 31, 44):
        scores, x = torch.randn(2, n), torch.randn(2, n, 6)
        for got, wanted in zip(compiled(scores, x), step(scores, x), strict=True):
            assert_same(got, wanted)
    assert compilations == 1
