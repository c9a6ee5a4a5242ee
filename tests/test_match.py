"""bipartite_match and nearest against the specification, on every backend."""

import math
from collections.abc import Sequence

import fastok
import pytest
import torch
from fastok import reference
from fastok.testing import Backend, assert_accurate, assert_same, over_backends
from fastok.testing.backends import available_backends
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CUDA = ("cuda", "cuda-on-host")


def signs(*shape: int) -> Tensor:
    """±1 entries: with a width that is a power of 4 all norms and cosines are exact, so ties are ties everywhere."""
    return torch.randint(0, 2, shape).float() * 2 - 1


def some_nan(x: Tensor, share: float = 0.3) -> Tensor:
    return torch.where(torch.rand(x.shape[:2])[..., None] < share, math.nan, x)


def tokens_of(*values: float) -> Tensor:
    return torch.tensor(values)[None, :, None].expand(1, len(values), 4).clone()


EXACT_INPUTS = {
    "signs": lambda: signs(3, 37, 16),
    "signs-wide": lambda: signs(2, 150, 64),
    "signs-one-channel": lambda: signs(2, 20, 1),
    "all-equal": lambda: torch.ones(2, 33, 16),
    "zeros": lambda: torch.zeros(2, 12, 5),
    "some-zero": lambda: signs(2, 30, 16) * torch.randint(0, 2, (2, 30, 1)),
    "nan-tokens": lambda: some_nan(signs(3, 41, 4)),
    "all-nan": lambda: torch.full((2, 9, 4), math.nan),
    "one-nan-destination": lambda: tokens_of(1, math.nan, 1, 1, -1, 1),
    "infinite": lambda: tokens_of(1, 1, math.inf, 1, 1, -math.inf, 1),
    "one-token": lambda: signs(2, 1, 4),
    "two-tokens": lambda: signs(2, 2, 4),
    "no-token": lambda: signs(2, 0, 4),
    "no-sample": lambda: signs(0, 6, 4),
    "huge-and-tiny": lambda: signs(2, 24, 16) * torch.tensor([2.0**120, 2.0**-38, 1.0]).repeat(8)[None, :, None],
}
OPTIONS = {
    "plain": {},
    "class-token": {"protect": 1},
    "registers": {"protect": 5},
    "sorted": {"sorted_order": True},
    "sorted-protected": {"sorted_order": True, "protect": 2},
    "threshold": {"threshold": 0.2},
    "threshold-sorted": {"threshold": -0.1, "sorted_order": True, "protect": 1},
    "bias": {"bias": True},
    "bias-threshold": {"bias": True, "threshold": 0.1, "protect": 1},
    "static": {"static_shape": True},
    "static-protected": {"static_shape": True, "protect": 1},
    "pair": {"pair": "shared"},
    "pair-per-sample": {"pair": "each"},
    "pair-protected": {"pair": "each", "protect": 2},
}


def assert_same_map(got: Sequence[Tensor], wanted: Sequence[Tensor], name: str = "") -> None:
    for part, first, second in zip(("assign", "counts", "offsets", "members"), got, wanted, strict=True):
        assert_same(first, second, f"{name}: {part}")


def assert_same_nearest(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for part, first, second in zip(("value", "index"), got, wanted, strict=True):
        assert_same(first, second, part)


def arguments(metric: Tensor, r: int, options: dict) -> tuple:
    """The flat arguments of the op; r is clamped as the public function does."""
    batch, n, _ = metric.shape
    protect = min(options.get("protect", 0), n)
    bias = torch.randint(-2, 3, (batch, n)).float() if options.get("bias") else None
    src = dst = None
    limit = (n - protect) // 2
    if options.get("pair"):
        rows = 1 if options["pair"] == "shared" else batch
        order = torch.stack([torch.randperm(n) for _ in range(rows)]) if rows else torch.empty(0, n, dtype=torch.int64)
        src, dst = order[:, : n // 3], order[:, n // 3 : n // 3 + n // 2]
        if rows == 1 and options["pair"] == "shared":
            src, dst = src[0], dst[0]
        limit = src.shape[-1] if dst.shape[-1] else 0
    return (
        metric, min(r, limit), protect, options.get("threshold"), bias, src, dst,
        options.get("sorted_order", False), options.get("static_shape", False),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@over_backends("bipartite_match", without=("reference",))
def test_exact_inputs_match_the_specification(backend: Backend, options: dict, dtype: torch.dtype) -> None:
    if backend.name in CUDA and not options.get("static_shape") and "threshold" not in options:
        pytest.skip("CUDA is only ever asked for static shapes: see static")
    for name, make in EXACT_INPUTS.items():
        if name == "huge-and-tiny" and dtype == torch.float16:
            continue  # out of its range
        metric = make().to(dtype)
        for r in (1, metric.shape[1] // 4, metric.shape[1]):
            args = arguments(metric, r, options)
            assert_same_map(backend.bipartite_match(*args), reference.match_map(*args), f"{name}, r={args[1]}")


def margin(metric: Tensor, protect: int, r: int) -> float:
    """How far the fp64 reference is from deciding otherwise: best against second destination, r-th against next."""
    unit = reference.match.unit(metric.double())
    scores = unit[:, 0::2] @ unit[:, 1::2].mT
    scores = scores[:, (protect + 1) // 2 :, protect // 2 :]
    if scores.numel() == 0:
        return math.inf
    top = scores.topk(min(2, scores.shape[2]), dim=2).values
    between = (top[..., 0] - top[..., 1]).min() if top.shape[2] == 2 else torch.tensor(math.inf)
    ranked = top[..., 0].sort(dim=1, descending=True).values
    gaps = (ranked[:, :-1] - ranked[:, 1:]) if ranked.shape[1] > 1 else torch.tensor(math.inf)
    return float(min(between, gaps.min()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "n", "width", "r", "protect"),
    [
        (2, 17, 3, 4, 1),
        (1, 64, 37, 20, 0),
        (3, 50, 64, 24, 2),
        (2, 129, 80, 16, 1),
        (1, 197, 64, 16, 1),
    ],
)
@over_backends("bipartite_match", without=("reference",))
def test_random_inputs_match_the_fp64_reference(
    backend: Backend, batch: int, n: int, width: int, r: int, protect: int, dtype: torch.dtype
) -> None:
    compared = 0
    for seed in range(40):
        metric = torch.randn(batch, n, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
        # A decision closer than this is fp32 rounding: width products, each within 2^-24, on both sides.
        if margin(metric, protect, r) < 4 * (width + 8) * 2.0**-24:
            continue
        args = (metric, r, protect, None, None, None, None, False, True)
        assert_same_map(backend.bipartite_match(*args), reference.match_map(metric.double(), *args[1:]))
        compared += 1
        if compared == 3:
            return
    assert compared, "every seed was too close to call: choose another shape"


@given(
    batch=st.integers(0, 3),
    n=st.integers(0, 40),
    r=st.integers(0, 45),
    protect=st.integers(0, 6),
    threshold=st.none() | st.sampled_from([-1.0, 0.0, 0.5, 1.0]),
    sorted_order=st.booleans(),
    static_shape=st.booleans(),
    nan=st.booleans(),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(DTYPES),
)
@over_backends("bipartite_match", without=("reference", "cuda", "triton-interpreter"))
def test_any_arguments_match_the_specification(
    backend: Backend, batch, n, r, protect, threshold, sorted_order, static_shape, nan, seed, dtype
) -> None:
    torch.manual_seed(seed)
    metric = signs(batch, n, 16)
    metric = (some_nan(metric) if nan else metric).to(dtype)
    static_shape |= backend.name in CUDA
    options = {"protect": protect, "threshold": threshold, "sorted_order": sorted_order, "static_shape": static_shape}
    args = arguments(metric, r, options)
    assert_same_map(backend.bipartite_match(*args), reference.match_map(*args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over_backends("bipartite_match", without=("reference",))
def test_strided_and_misaligned_views(backend: Backend, dtype: torch.dtype) -> None:
    wide = torch.full((3, 40, 120), math.nan, dtype=dtype)
    for offset in range(0, 20, 3):
        view = wide[:, 2:37, offset : offset + 64]
        view.copy_(signs(3, 35, 64))
        args = (view, 9, 1, None, None, None, None, False, True)
        assert_same_map(backend.bipartite_match(*args), reference.match_map(*args), f"offset {offset}")
        wide.fill_(math.nan)
    transposed = signs(2, 16, 30).to(dtype).mT
    args = (transposed, 9, 1, None, None, None, None, False, True)
    assert_same_map(backend.bipartite_match(*args), reference.match_map(*args), "transposed")


@over_backends("bipartite_match", without=("reference", "triton-interpreter"))
def test_batch_invariant_and_repeatable(backend: Backend) -> None:
    metric = torch.randn(5, 131, 48)
    args = (20, 1, None, None, None, None, False, True)
    whole = backend.bipartite_match(metric, *args)
    again = backend.bipartite_match(metric, *args)
    assert_same_map(again, whole)
    for b in range(5):
        alone = backend.bipartite_match(metric[b : b + 1], *args)
        assert_same_map(alone, [part[b : b + 1] for part in whole])


# What products of split rows cannot tell apart, or not all of them.
CLOSE = {
    "random": lambda n, width: torch.randn(3, n, width),
    "duplicates": lambda n, width: torch.randn(3, 20, width)[:, torch.randint(20, (n,))],
    "some-duplicates": lambda n, width: torch.randn(3, n, width)[:, torch.randint(n, (n,))],
    "last-digits": lambda n, width: torch.randn(3, 9, width)[:, torch.randint(9, (n,))] + 1e-6 * torch.randn(n, width),
    "clusters": lambda n, width: torch.randn(3, 5, width)[:, torch.randint(5, (n,))] + 1e-3 * torch.randn(n, width),
    "opposite": lambda n, width: torch.randn(1, 1, width) * (torch.randint(0, 2, (3, n, 1)) * 2 - 1),
    "one-direction": lambda n, width: torch.ones(3, n, width) + 1e-4 * torch.randn(n, width),
    "few-channels": lambda n, width: torch.randn(3, n, width) * (torch.arange(width) % 17 == 3),
    "some-zero": lambda n, width: torch.randn(3, n, width) * torch.randint(0, 2, (3, n, 1)),
    "some-nan": lambda n, width: some_nan(torch.randn(3, n, width), 0.1),
    "huge-and-tiny": lambda n, width: torch.randn(3, n, width) * 10.0 ** torch.randint(-30, 30, (3, n, 1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "width"), [(129, 32), (200, 33), (577, 64), (331, 100), (300, 320)])
@pytest.mark.parametrize("close", CLOSE)
def test_tiles_decide_as_fp32_vectors_do(close: str, n: int, width: int, dtype: torch.dtype) -> None:
    """One sample, shared out over threads, and more of them than there are threads."""
    backends = {backend.name: backend for backend, reason in available_backends("bipartite_match") if reason is None}
    vectors = backends.get("cpu-avx512_bf16")
    if vectors is None:
        pytest.skip("needs AMX, and the instruction set below it to compare with")
    metric = CLOSE[close](n, width).to(dtype)
    for batch in (1, 3):
        args = (metric[:batch], n // 3, 1, None, None, None, None, False, True)
        assert_same_map(backends["cpu"].bipartite_match(*args), vectors.bipartite_match(*args))


def published(metric: Tensor, r: int, class_token: bool) -> list[list[int]]:
    """ToMe as in the paper, one sample, as lists of members in output order (spec_vit §1)."""
    unit = metric / metric.norm(dim=-1, keepdim=True)
    a, b = unit[0::2], unit[1::2]
    scores = a @ b.T
    if class_token:
        scores[0] = -math.inf
    best, mate = scores.max(-1)
    order = best.argsort(descending=True)
    merged, kept = order[:r], order[r:]
    kept = kept.sort().values if class_token else kept
    groups = [[2 * int(i)] for i in kept] + [[2 * j + 1] for j in range(len(b))]
    for i in merged:
        groups[len(kept) + int(mate[i])].append(2 * int(i))
    return [sorted(group) for group in groups]


@pytest.mark.parametrize("class_token", [False, True])
def test_order_is_the_published_one(class_token: bool) -> None:
    metric = torch.randn(1, 65, 32)
    token_map = fastok.bipartite_match(metric, 20, protect=int(class_token))
    groups = [(token_map.assign[0] == slot).nonzero()[:, 0].tolist() for slot in range(token_map.n_out)]
    assert groups == published(metric[0], 20, class_token)


def test_r_is_clamped_and_zero_is_the_identity() -> None:
    metric = torch.randn(2, 11, 8)
    assert fastok.bipartite_match(metric, 100).n_out == 6
    assert fastok.bipartite_match(metric, 100, protect=3).n_out == 7
    for token_map in (
        fastok.bipartite_match(metric, 0),
        fastok.bipartite_match(metric, 5, protect=11),
        fastok.bipartite_match(metric, 5, threshold=2.0),
    ):
        assert token_map.n_out == 11
        assert token_map.counts.tolist() == [11, 11]
        assert token_map.assign.tolist() == [list(range(11))] * 2


def test_nan_sources_shrink_the_merge() -> None:
    metric = torch.randn(2, 10, 8)
    metric[1, [0, 2, 4]] = math.nan
    token_map = fastok.bipartite_match(metric, 5)
    assert token_map.counts.tolist() == [5, 8]
    assert token_map.n_out == 8
    alone = token_map.assign[1, [0, 2, 4]]
    assert [int((token_map.assign[1] == slot).sum()) for slot in alone] == [1, 1, 1]


def test_bias_ranks_but_does_not_pass_the_threshold() -> None:
    metric = torch.eye(4)[[0, 0, 1, 2]][None]  # source 0 equals destination 1; source 2 is orthogonal to both
    bias = torch.tensor([[0.0, 0.0, 5.0, 0.0]])
    token_map = fastok.bipartite_match(metric, 1, bias=bias)
    assert token_map.assign[0, 2] == token_map.assign[0, 1]
    token_map = fastok.bipartite_match(metric, 1, bias=bias, threshold=0.5)
    assert token_map.counts.tolist() == [3]
    assert token_map.assign[0, 0] == token_map.assign[0, 1]


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"r": -1}, ValueError, "r must be >= 0, got -1"),
        ({"r": 1.5}, TypeError, "r must be an int"),
        ({"r": True}, TypeError, "r must be an int"),
        ({"protect": 9}, ValueError, "protect must be within"),
        ({"protect": -1}, ValueError, "protect must be within"),
        ({"order": "best"}, ValueError, "'best'"),
        ({"partition": "random"}, ValueError, "'random'"),
        ({"partition": [0, 1]}, TypeError, "partition"),
        ({"partition": (0, 1)}, TypeError, "partition src must be a tensor, got int 0"),
        ({"threshold": "0.5"}, TypeError, "threshold must be a number, got str '0.5'"),
        ({"metric": None}, TypeError, "metric must be a tensor, got NoneType"),
        (
            {"partition": (torch.tensor([0, 8]), torch.tensor([1]))},
            ValueError,
            r"partition src must be within \[0, 8\), got 8",
        ),
        ({"partition": (torch.tensor([0]), torch.tensor([-1]))}, ValueError, "partition dst"),
        ({"partition": (torch.tensor([0, 1]), torch.tensor([1]))}, ValueError, "repeated"),
        ({"partition": (torch.tensor([0.0]), torch.tensor([1]))}, TypeError, "integer"),
        ({"partition": (torch.zeros(3, 1).long(), torch.ones(3, 1).long())}, ValueError, "partition src"),
        ({"metric": torch.ones(2, 8, 4, dtype=torch.int64)}, TypeError, "metric must have dtype"),
        ({"metric": torch.ones(8, 4)}, ValueError, "metric must be"),
        ({"bias": torch.zeros(2, 7)}, ValueError, "bias must have shape"),
        ({"bias": torch.zeros(2, 8, dtype=torch.float64)}, TypeError, "bias must have dtype float32"),
        ({"bias": torch.zeros(2, 8, device="meta")}, ValueError, "same device"),
    ],
)
def test_bad_arguments(kwargs: dict, error: type[Exception], text: str) -> None:
    arguments = {"metric": torch.randn(2, 8, 4), "r": 2} | kwargs
    with pytest.raises(error, match=text):
        fastok.bipartite_match(arguments.pop("metric"), arguments.pop("r"), **arguments)


# ---- nearest ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("k", [1, 2, 7, 33])
@over_backends("nearest", without=("reference",))
def test_nearest_exact_inputs(backend: Backend, k: int, similarity: str, dtype: torch.dtype) -> None:
    x, y = signs(2, 29, 16).to(dtype), signs(2, 33, 16).to(dtype)
    mask = torch.rand(2, 33) < 0.7
    mask[1] = False
    for candidates, allowed in (
        (y, None),
        (y, mask),
        (some_nan(y.float()).to(dtype), None),
        (torch.ones_like(y), None),
    ):
        args = (x, candidates, k, similarity, allowed)
        assert_same_nearest(backend.nearest(*args), reference.nearest_rows(*args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
@over_backends("nearest", without=("reference",))
def test_nearest_is_as_accurate_as_torch(backend: Backend, similarity: str, dtype: torch.dtype) -> None:
    for scale, shift in ((1.0, 0.0), (1.0, 100.0), (2.0**40, 0.0), (2.0**-30, 0.0)):
        if dtype == torch.float16 and scale != 1:
            continue
        x, y = ((torch.randn(2, n, 37) + shift) * scale for n in (40, 70))
        x, y = x.to(dtype), y.to(dtype)
        value, index = backend.nearest(x, y, 5, similarity, None)
        truth = reference.nearest_rows(x.double(), y.double(), 70, similarity, None)
        full = torch.empty(2, 40, 70, dtype=torch.float64).scatter_(2, truth[1], truth[0])
        peer = reference.nearest_rows(x, y, 5, similarity, None)[0]
        assert_accurate(value, full.gather(2, index), peer)  # the values are those of the rows named
        assert_accurate(value, truth[0][..., :5], peer)  # and these are the best ones


@given(
    n=st.integers(0, 20), m=st.integers(1, 40), k=st.integers(1, 40), width=st.sampled_from([1, 4, 16]),
    similarity=st.sampled_from(["cosine", "dot", "euclidean"]), seed=st.integers(0, 1000),
)  # fmt: skip
@over_backends("nearest", without=("reference", "cuda"))
def test_nearest_any_shape(backend: Backend, n, m, k, width, similarity, seed) -> None:
    torch.manual_seed(seed)
    args = (signs(2, n, width), signs(2, m, width), min(k, m), similarity, torch.rand(2, m) < 0.8)
    assert_same_nearest(backend.nearest(*args), reference.nearest_rows(*args))


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"k": 0}, ValueError, r"k must be within \[1, M=5\], got 0"),
        ({"k": 6}, ValueError, "got 6"),
        ({"similarity": "l2"}, ValueError, "'l2'"),
        ({"mask": torch.ones(1, 4, dtype=torch.bool)}, ValueError, "mask must have shape"),
        ({"mask": torch.ones(1, 5)}, TypeError, "mask must have dtype bool"),
        ({"y": torch.randn(1, 5, 3).half()}, TypeError, "y must have dtype float32"),
        ({"y": torch.randn(1, 5, 4)}, ValueError, "y must have shape"),
    ],
)
def test_nearest_bad_arguments(kwargs: dict, error: type[Exception], text: str) -> None:
    arguments = {"x": torch.randn(1, 2, 3), "y": torch.randn(1, 5, 3)} | kwargs
    with pytest.raises(error, match=text):
        fastok.nearest(arguments.pop("x"), arguments.pop("y"), **arguments)


# ---- torch integration -----------------------------------------------------------------------------------------------


def test_opcheck() -> None:
    metric = torch.randn(2, 13, 8, requires_grad=True)
    pair = (torch.tensor([0, 2, 4]), torch.tensor([1, 3]))
    for args in (
        (metric, 3, 1, None, None, None, None, False, True),
        (metric, 3, 0, 0.1, torch.randn(2, 13), None, None, True, False),
        (metric, 3, 0, None, None, *pair, False, True),
        (metric.half(), 0, 0, None, None, None, None, False, False),
    ):
        torch.library.opcheck(torch.ops.fastok.bipartite_match.default, args)
    x, y = torch.randn(2, 6, 8), torch.randn(2, 9, 8)
    torch.library.opcheck(torch.ops.fastok.nearest.default, (x, y, 3, "euclidean", None))
    torch.library.opcheck(torch.ops.fastok.nearest.default, (x, y, 1, "cosine", torch.rand(2, 9) < 0.5))


def test_compiles_without_graph_break_or_recompilation() -> None:
    compilations = 0

    def counting(graph, inputs):
        nonlocal compilations
        compilations += 1
        return graph

    @torch.compile(fullgraph=True, dynamic=True, backend=counting)
    def step(metric: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        token_map = fastok.bipartite_match(metric, 4, protect=1)
        value, _ = fastok.nearest(x, x, 2)
        return token_map.merge(x)[0], value

    for n in (20, 31, 44):
        metric, x = torch.randn(2, n, 8), torch.randn(2, n, 6)
        merged, value = step(metric, x)
        assert_same(merged, fastok.bipartite_match(metric, 4, protect=1).merge(x)[0])
        assert_same(value, fastok.nearest(x, x, 2)[0])
    assert compilations == 1
