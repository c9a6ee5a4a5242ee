"""Every CUDA kernel, run on the host SIMT machine, against the specification, on inputs chosen to be awkward."""

import itertools

import pytest
import torch

host = pytest.importorskip("host_cuda")
match = pytest.importorskip("fastok.reference.match")
merge = pytest.importorskip("fastok.reference.merge")

NAN = float("nan")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True, params=[0, 1])
def schedule(request):
    """Another order of blocks and threads."""
    host.seed = 1000 * request.param
    torch.manual_seed(request.param)


def same(ours, spec):
    for a, b in zip(ours, spec, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def signs(batch, n, width, dtype):
    """Entries +-1: with a width of 4**i, cosines are exact and ties abound."""
    return (torch.randint(0, 2, (batch, n, width)) * 2 - 1).to(dtype)


def unaligned(x):
    """The same values at an odd offset, with odd strides."""
    batch, n, width = x.shape
    room = torch.full((batch, n + 1, width + 3), NAN, dtype=x.dtype)
    room[:, 1:, 1 : width + 1] = x
    return room[:, 1:, 1 : width + 1]


def pair(n, batch=None):
    """Sources, destinations and some tokens in neither, in no order."""
    rows = [torch.randperm(n) for _ in range(batch or 1)]
    order = torch.stack(rows) if batch else rows[0]
    n_src = n // 2
    return order[..., :n_src], order[..., n_src : max(n - n // 8, n_src + 1)]


def check_match(metric, r, protect=0, threshold=None, bias=None, src=None, dst=None):
    for sorted_order in (False, True):
        arguments = (metric, r, protect, threshold, bias, src, dst, sorted_order, True)
        same(host.match_map(*arguments), match.match_map(*arguments))


# ---- bipartite_match -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 7, 33, 130, 197])
def test_ties(n, dtype):
    metric = signs(2, n, 16, dtype)
    for protect in (0, 1, 2):
        most = max(n - protect, 0) // 2
        for r in sorted({0, 1, most // 2, most}):
            if r <= most:
                check_match(metric, r, min(protect, n))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [40, 150])
def test_pairs_bias_threshold(n, dtype):
    metric = signs(3, n, 64, dtype)
    bias = torch.randint(-2, 3, (3, n)).float() / 8
    bias[0, ::5] = NAN
    bias[1, ::7] = float("inf")
    bias[2, ::3] = -float("inf")
    for batch, threshold, ranking in itertools.product((None, 3), (None, 0.0, 0.125, -2.0, 2.0), (None, bias)):
        src, dst = pair(n, batch)
        check_match(metric, src.shape[-1] // 2, 0, threshold, ranking, src, dst)
        check_match(metric, src.shape[-1], 0, threshold, ranking, src, dst)
        if threshold is not None:
            check_match(metric, src.shape[-1] // 3, 4, threshold, ranking, src, dst)
        check_match(metric, (n - 2) // 3, 2, threshold, ranking)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_degenerate_tokens(dtype):
    metric = signs(6, 60, 16, dtype)
    metric[0, ::4] = NAN  # sources
    metric[1, 1::4] = NAN  # destinations
    metric[2] = NAN
    metric[3] = 1  # all equal
    metric[4] = 0
    metric[5, 3, 2] = float("inf")
    metric[5, 6, 1] = -float("inf")
    metric[5, 10:20] = 0
    for r, protect, threshold in itertools.product((1, 14, 29), (0, 1), (None, 0.0)):
        check_match(metric, r, protect, threshold)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 3, 8, 15, 64, 65, 100, 200, 600])
def test_widths_and_views(width, dtype):
    metric = torch.randn(2, 37, width).to(dtype)
    plain = host.match_map(metric, 11, 1, None, None, None, None, False, True)
    for x in (unaligned(metric), metric.transpose(0, 1).contiguous().transpose(0, 1), metric.mT.contiguous().mT):
        same(host.match_map(x, 11, 1, None, None, None, None, False, True), plain)
    if width > 10:  # below, cosines crowd near 1
        check_match(metric, 11, 1)
    score, index = host.nearest(metric, unaligned(metric))
    spec_score, _ = match.nearest(metric.double(), metric.double())
    torch.testing.assert_close(score.double(), spec_score, rtol=0, atol=1e-6)
    if width > 1:
        assert (index[..., 0] == torch.arange(37)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("power", [-130, -70, -30, 50, 100, 126])
def test_magnitudes(power, dtype):
    metric = torch.randn(1, 40, 24).clamp(-1.9, 1.9).to(dtype)
    scaled = metric.clone()
    scaled[:, ::3] *= 2.0**power
    check_match(scaled, 12)
    score, _ = host.nearest(scaled, scaled)
    spec, _ = match.nearest(scaled, scaled)
    torch.testing.assert_close(score, spec, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n", [300, 1025, 1500])
def test_many_tokens(n):
    metric = signs(1, n, 16, torch.float16)
    check_match(metric, n // 4)
    check_match(metric, n // 3, 1)
    bias = torch.randint(-2, 3, (1, n)).float() / 8
    check_match(metric, n // 5, 0, 0.5, bias)
    src, dst = pair(n)
    check_match(metric, n // 3, 0, 0.25, bias, src, dst)
    check_match(metric[:, :1].expand(1, n, 16), n // 3, 0, None, None, src, dst)
    everything = torch.randperm(n)
    check_match(metric, n - 1, 0, None, None, everything[: n - 1], everything[n - 1 :])


@pytest.mark.parametrize(("n", "n_src"), [(2100, 2080), (4200, 40), (4096, 2048)])
def test_around_the_fused_limits(n, n_src):
    metric = signs(1, n, 16, torch.float16)
    bias = torch.randint(-2, 3, (1, n)).float() / 8
    everything = torch.randperm(n)
    src, dst = everything[:n_src], everything[n_src : n_src + 20]
    for ranking, threshold in ((None, None), (bias, 0.25)):
        check_match(metric, n_src // 2, 0, threshold, ranking, src, dst)


def test_nothing():
    for batch, n in ((0, 5), (2, 0), (2, 1)):
        assert batch == 0 or n <= 1
        if batch and n:
            check_match(torch.randn(batch, n, 8), 0)


def test_repeated_positions_stay_inside():
    metric = torch.randn(2, 40, 16)
    src, dst = torch.randint(0, 40, (2, 30)), torch.randint(0, 40, (2, 30))
    for sorted_order, protect, r in itertools.product((False, True), (0, 5), (3, 30)):
        with host.races_allowed():
            assign, _, offsets, members = host.match_map(metric, r, protect, None, None, src, dst, sorted_order, True)
        assert assign.max() < 40
        assert offsets.min() >= 0
        assert offsets.max() <= 40
        assert members.min() >= -1
        assert members.max() < 40


# ---- nearest ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize(("n", "m", "k"), [(1, 1, 1), (5, 9, 9), (70, 130, 1), (70, 130, 5), (20, 100, 100)])
def test_nearest_exact(n, m, k, similarity, dtype):
    x, y = signs(2, n, 16, dtype), signs(2, m, 16, dtype)
    mask = torch.rand(2, m) < 0.5
    mask[1] = m > 9
    for at in (None, mask, mask[:, ::1].repeat(1, 2)[:, ::2][:, :m]):
        same(
            host.nearest(x, unaligned(y), k, similarity=similarity, mask=at),
            match.nearest(x, y, k, similarity=similarity, mask=at),
        )
    x[0, 0] = NAN
    y[1, m // 2] = NAN
    same(host.nearest(x, y, k, similarity=similarity), match.nearest(x, y, k, similarity=similarity))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("k", [1, 40])
def test_nearest_accuracy(k, similarity, dtype):
    x, y = (torch.randn(2, 33, 70) + 3).to(dtype), (torch.randn(2, 80, 70) + 3).to(dtype)
    value, _ = host.nearest(x, y, k, similarity=similarity)
    spec, _ = match.nearest(x.double(), y.double(), k, similarity=similarity)
    scale = 1 if similarity == "cosine" else spec.abs().max().item()
    torch.testing.assert_close(value.double(), spec, rtol=0, atol=1e-6 * scale)


def test_nearest_infinity():
    x, y = torch.ones(1, 3, 8), torch.ones(1, 4, 8)
    y[0, 2, 1] = float("inf")
    for similarity in ("dot", "euclidean"):
        same(host.nearest(x, y, 4, similarity=similarity), match.nearest(x, y, 4, similarity=similarity))
    same(host.nearest(x, y, 1, similarity="dot"), match.nearest(x, y, 1, similarity="dot"))


# ---- maps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "n_out"), [(0, 0), (0, 3), (5, 0), (1, 1), (40, 7), (300, 1), (700, 300), (3000, 2500)])
def test_build_map(n, n_out):
    assign = torch.randint(-1, max(n_out, 0), (2, n), dtype=torch.int32) if n_out else torch.full((2, n), -1).int()
    same(host.build_map(assign, n_out), merge.build_map(assign, n_out))


def test_build_map_beyond_shared_memory():
    assign = torch.randint(-1, 30000, (1, 2000), dtype=torch.int32)
    same(host.build_map(assign, 30000), merge.build_map(assign, 30000))


# ---- merge, unmerge --------------------------------------------------------------------------------------------------


def token_map(batch, n, n_out):
    assign = torch.randint(-1, n_out, (batch, n), dtype=torch.int32)
    return (assign, *merge.build_map(assign, n_out))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("mode", ["mean", "sum", "max", "first"])
@pytest.mark.parametrize("channels", [1, 3, 16, 40, 768])
def test_merge(channels, mode, dtype):
    maps = token_map(2, 50, 20)
    x = torch.randn(2, 50, channels, dtype=torch.float64).to(dtype)
    x[0, 3] = NAN
    x[1, ::2] = 1
    size = torch.randint(0, 3, (2, 50)).float()
    tolerance = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for source, weight in itertools.product(
        (x, unaligned(x), x.mT.contiguous().mT), (None, size, size.mT.contiguous().mT)
    ):
        y, size_out = host.merge(source, *maps, weight, mode)
        spec, spec_size = merge.merge(x, *maps, weight, mode)
        torch.testing.assert_close(y, spec, rtol=tolerance, atol=tolerance, equal_nan=True)
        same((size_out,), (spec_size,))
        grad = torch.randn(2, 20, channels, dtype=torch.float64).to(dtype)
        ours = host.merge_backward(grad, source, spec, *maps, weight, spec_size, mode)
        theirs = merge.merge_backward(grad, x, spec, *maps, weight, spec_size, mode)
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_lone_members_are_copied(dtype):
    x = torch.randn(2, 30, 24).to(dtype)
    x[0, 0, 0] = -0.0
    assign = torch.stack([torch.randperm(30) for _ in range(2)]).int()
    maps = (assign, *merge.build_map(assign, 30))
    spec = torch.empty_like(x).scatter_(1, assign.long()[..., None].expand_as(x), x)
    for mode, size in itertools.product(("mean", "sum", "max", "first"), (None, torch.rand(2, 30) + 1e-3)):
        y, _ = host.merge(x, *maps, size, mode)
        assert torch.equal(y.signbit(), spec.signbit())
        assert torch.equal(y, spec)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("channels", [1, 5, 32, 100])
def test_unmerge(channels, dtype):
    maps = token_map(3, 45, 12)
    y, residual = torch.randn(3, 12, channels).to(dtype), torch.randn(3, 45, channels).to(dtype)
    for rows in (y, unaligned(y), y.mT.contiguous().mT):
        same((host.unmerge(rows, *maps, None),), (merge.unmerge(y, *maps, None),))
        same((host.unmerge(rows, *maps, residual),), (merge.unmerge(y, *maps, residual),))


def test_merge_of_nothing():
    maps = token_map(2, 0, 3)
    same(host.merge(torch.randn(2, 0, 8), *maps, None, "mean"), merge.merge(torch.randn(2, 0, 8), *maps, None, "mean"))
    maps = token_map(2, 6, 3)
    size = torch.rand(2, 6)
    y, size_out = host.merge(torch.randn(2, 6, 0), *maps, size, "sum")
    assert y.shape == (2, 3, 0)
    torch.testing.assert_close(size_out, merge.merge(torch.randn(2, 6, 0), *maps, size, "sum")[1])
