"""VisionZip, RecoverableCompression, AveragePool and FourierPool, which merge tokens: literal cases, worked out by hand
next to each, and against the published steps written out with Python numbers or numpy."""

import math
from typing import Any

import numpy
import pytest
import torch
from fastok import SoftMap, TokenMap
from fastok.reducers import AveragePool, FourierPool, RecoverableCompression, TokenContext, VisionZip
from fastok.reducers.common import outliers
from torch import Tensor

# ---- VisionZip ------------------------------------------------------------------------------------------------------


def visionzip_case() -> TokenContext:
    """The class token looks most at 3, then 5. The mean keys of 0, 1 and 6 point right, of 2, 4 and 7 up: two heads
    that mean little by themselves."""
    right, up = torch.tensor([[3.0, 8.0], [-1.0, -8.0]]), torch.tensor([[5.0, -1.0], [-5.0, 2.0]])
    keys = torch.stack([right, right, up, up, up, right, 2 * right, up])
    scores = torch.tensor([[0.1, 0.1, 0.1, 0.9, 0.1, 0.8, 0.1, 0.1]])
    return TokenContext(2.0 ** torch.arange(8.0)[None, :, None], keys[None], scores={"cls": scores})


def test_visionzip() -> None:
    """Dominant 3 and 5. Of the rest, 0, 1, 2, 4, 6, 7, every third is a target: 0 and 4. To 0 go 1 and 6, to 4 go 2 and
    7. With x_i = 2^i the contextual tokens are 1 + (2 + 64) / 2 = 34 and 16 + (4 + 128) / 2 = 82."""
    ctx = visionzip_case()
    reduction = VisionZip(2, 2)(ctx)
    assert isinstance(reduction, SoftMap)
    expected = torch.zeros(1, 4, 8)
    expected[0, 0, 3] = expected[0, 1, 5] = expected[0, 2, 0] = expected[0, 3, 4] = 1
    expected[0, 2, [1, 6]] = expected[0, 3, [2, 7]] = 0.5
    assert torch.equal(reduction.dense(), expected)
    assert reduction.merge(ctx.hidden)[0].flatten().tolist() == [8, 32, 34, 82]
    means = VisionZip(2, 2, "mean")(ctx)
    assert isinstance(means, TokenMap)
    assert means.assign.tolist() == [[2, 2, 3, 0, 3, 1, 2, 3]]
    torch.testing.assert_close(means.merge(ctx.hidden)[0].flatten(), torch.tensor([8, 32, 67 / 3, 148 / 3]))


def test_visionzip_without_members_or_targets() -> None:
    """Six contextual tokens need no merging: all 8 stay. Of five, in steps of 1, the targets are 0, 1, 2, 4 and 6, and
    7 goes to the first whose key points up, 2. Without contextual tokens the dominant ones are left."""
    ctx = visionzip_case()
    assert VisionZip(2, 6)(ctx).assign.tolist() == [list(range(8))]
    reduction = VisionZip(2, 5)(ctx)
    assert reduction.merge(ctx.hidden)[0].flatten().tolist() == [8, 32, 1, 2, 4 + 128, 16, 64]
    assert VisionZip(2, 0)(ctx).representative.tolist() == [[3, 5]]
    assert VisionZip(0.25, 0.3)(ctx).n_out == 2 + 2  # 2 and 2.4 of 8, rounded down


def test_visionzip_counts_the_class_token_as_dominant() -> None:
    """With token 0 as the class token, dominant 2 is the class token and 3; the rest 1, 2, 4, 5, 6, 7 has targets 1 and
    5 (both right), and everything goes to 1, the first; even those that point up, which are as unlike both."""
    ctx = visionzip_case()
    ctx.protect = 1
    assert VisionZip(2, 2)(ctx).merge(ctx.hidden)[0].flatten().tolist() == [1, 8, 2 + (4 + 16 + 64 + 128) / 4, 32]


def published_visionzip(x: Tensor, scores: list[float], keys: Tensor, dominant: int, contextual: int) -> Tensor:
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    kept = sorted(order[:dominant])
    rest = [i for i in range(len(scores)) if i not in kept]
    step = max(1, len(rest) // contextual)
    targets = rest[::step][:contextual]
    metric = keys.double().mean(1)
    metric = metric / metric.norm(dim=1, keepdim=True)
    members: dict[int, list[int]] = {target: [] for target in targets}
    for i in rest:
        if i not in targets:
            members[max(targets, key=lambda j: (float(metric[i] @ metric[j]), -j))].append(i)
    rows = [x[i] for i in kept]
    rows += [x[j] + (torch.stack([x[i] for i in found]).mean(0) if found else 0) for j, found in members.items()]
    return torch.stack(rows)


@pytest.mark.parametrize(("dominant", "contextual"), [(12, 5), (1, 1), (30, 9), (5, 34)])
def test_visionzip_published_steps(dominant: int, contextual: int) -> None:
    x, keys, scores = torch.randn(2, 40, 6), torch.randn(2, 40, 3, 8), torch.rand(2, 40)
    merged, _ = VisionZip(dominant, contextual)(TokenContext(x, keys, scores={"cls": scores})).merge(x)
    for b in range(2):
        expected = published_visionzip(x[b].double(), scores[b].tolist(), keys[b], dominant, contextual)
        torch.testing.assert_close(merged[b].double(), expected, rtol=1e-5, atol=1e-5)


def test_visionzip_nan_and_errors() -> None:
    ctx = visionzip_case()
    ctx.keys[0, 7] = torch.nan
    assert VisionZip(2, 2)(ctx).merge(ctx.hidden)[0].flatten().tolist() == [8, 32, 34, 16 + 4]  # 7 is dropped
    assert VisionZip(2, 2, "mean")(ctx).assign[0, 7] == -1
    with pytest.raises(ValueError, match="dominant must be at least one token, got 0"):
        VisionZip(0, 2)
    with pytest.raises(ValueError, match="contextual must be at least 0, got -1"):
        VisionZip(2, -1)
    with pytest.raises(ValueError, match="aggregate must be one of 'add', 'mean'; got 'sum'"):
        VisionZip(aggregate="sum")


# ---- RecoverableCompression -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "scale", "expected"),
    [
        # Quartiles 2 and 4: the cut is 4 + 1.5 * 2 = 7.
        ([1, 2, 3, 4, 100], 1.5, [4]),
        ([1, 2, 3, 4, 7], 1.5, []),
        ([1, 2, 3, 4, 7.1], 1.5, [4]),
        ([1, 2, 3, 4, 7], 1.0, [4]),
        # Quartiles of four at 0.75 and 2.25 between 0, 1, 2, 10: 0.75 and 4; the cut is 8.875.
        ([10, 2, 1, 0], 1.5, [0]),
        # NaN is not there: as the first case.
        ([1, math.nan, 2, 3, 4, math.nan, 100], 1.5, [6]),
        ([5, 5, 5, 5], 1.5, []),
        ([5], 1.5, []),
        ([math.nan, math.nan], 1.5, []),
        ([], 1.5, []),
    ],
)
def test_outliers(row: list[float], scale: float, expected: list[int]) -> None:
    assert outliers(torch.tensor([row], dtype=torch.float32), scale)[0].nonzero()[:, 0].tolist() == expected


def recoverable_case() -> TokenContext:
    """12 tokens. The class token is e0, the question e1. Token 4 is like the class token, 9 like the question; the
    others lie in the plane of e2 and e3, 0 to 3, 5 and 6 near 10 e2, the rest near 10 e3."""
    vision = torch.zeros(12, 4)
    vision[4, 0] = vision[9, 1] = 1
    for i, (a, b) in {0: (10, 0), 1: (10, 1), 2: (10, -1), 3: (9, 0), 5: (11, 0), 6: (10, 2)}.items():
        vision[i, 2], vision[i, 3] = a, b
    for i, (a, b) in {7: (0, 10), 8: (1, 10), 10: (-1, 10), 11: (0, 9)}.items():
        vision[i, 2], vision[i, 3] = a, b
    extra = {"vision": vision[None], "vision_cls": torch.eye(4)[:1]}
    return TokenContext(
        torch.arange(12.0)[None, :, None].expand(1, 12, 4), extra=extra | {"question": torch.eye(4)[1:2]}
    )


def test_recoverable() -> None:
    """All similarities are 0 but those of 4 and of 9, so the quartiles are 0 and each is cut once: slots 0 and 1. The
    rest makes two clusters, with the means (0 + 1 + 2 + 3 + 5 + 6) / 6 and (7 + 8 + 10 + 11) / 4."""
    ctx = recoverable_case()
    token_map = RecoverableCompression(clusters=2, neighbors=3)(ctx)
    assert token_map.counts.tolist() == [4]
    assert token_map.assign.tolist() == [[2, 2, 2, 2, 0, 2, 2, 3, 3, 1, 3, 3]]
    torch.testing.assert_close(token_map.merge(ctx.hidden)[0][0, :4, 0], torch.tensor([4, 9, 17 / 6, 9]))
    assert RecoverableCompression(clusters=0)(ctx).assign.tolist() == [[-1] * 4 + [0] + [-1] * 4 + [1, -1, -1]]
    # More clusters than tokens are left for: each is one.
    assert RecoverableCompression(clusters=50)(ctx).counts.tolist() == [12]


def test_recoverable_compares_text_with_hidden_otherwise() -> None:
    ctx = recoverable_case()
    del ctx.extra["question"]
    ctx.hidden = torch.zeros(1, 12, 4)
    ctx.hidden[0, :, 0], ctx.hidden[0, 8] = 1, torch.tensor([0.0, 0.0, 3.0, 3.0])
    ctx.text = torch.tensor([[[-1.0, 0.0, 2.0, 0.0], [1.0, 0.0, 0.0, 2.0]]])  # the mean is (0, 0, 1, 1)
    assert RecoverableCompression(clusters=0)(ctx).representative[0, :3].tolist() == [4, 8, -1]


def test_recoverable_cuts_in_two_steps() -> None:
    """Independently: numpy's quantiles, first of all tokens, then of those that are left."""
    x, vision, token = torch.randn(3, 200, 6), torch.randn(3, 200, 5), torch.randn(3, 5)
    vision[:, ::20] += 3 * token[:, None]
    text = torch.randn(1, 3, 6)
    x[:, 5::20] += 2 * text.mean(1)
    ctx = TokenContext(x, text=text, extra={"vision": vision, "vision_cls": token})
    found = RecoverableCompression(clusters=0, scale=0.5)(ctx)
    seen = set()
    for b in range(3):
        visual = torch.cosine_similarity(vision[b], token[b], dim=-1).numpy()
        textual = torch.cosine_similarity(x[b], text[0].mean(0), dim=-1).numpy()

        def cut(values: Any) -> float:
            q1, q3 = numpy.quantile(values, [0.25, 0.75])
            return float(q3 + 0.5 * (q3 - q1))

        first = visual > cut(visual)
        second = ~first & (textual > cut(textual[~first]))
        seen |= {bool(first.any()), bool(second.any())}
        expected = (first | second).nonzero()[0].tolist()
        assert found.representative[b, : len(expected) + 1].tolist() == [*expected, -1][: len(expected) + 1]
    assert seen == {True}


def test_recoverable_nan_and_errors() -> None:
    ctx = recoverable_case()
    ctx.extra["vision"][0, 3, 2] = torch.nan
    token_map = RecoverableCompression(clusters=2, neighbors=3)(ctx)
    assert token_map.assign.tolist() == [[2, 2, 2, -1, 0, 2, 2, 3, 3, 1, 3, 3]]
    ctx.extra["vision_cls"] = torch.randn(1, 3)
    with pytest.raises(ValueError, match=r'extra\["vision_cls"\] must be \[B,C\], here B=1, C=4; got \[1, 3\]'):
        RecoverableCompression()(ctx)
    del ctx.extra["vision_cls"]
    with pytest.raises(ValueError, match=r'RecoverableCompression needs extra\["vision_cls"\]'):
        RecoverableCompression()(ctx)
    with pytest.raises(ValueError, match=r"neighbors must be within \[1, inf\], got 0"):
        RecoverableCompression(neighbors=0)
    with pytest.raises(TypeError, match=r"clusters must be an int, got float 2\.0"):
        RecoverableCompression(clusters=2.0)


# ---- AveragePool ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "stride", "protect", "expected"),
    [
        (6, 2, 0, [0, 0, 1, 1, 2, 2]),
        (7, 3, 0, [0, 0, 0, 1, 1, 1, -1]),  # the rest is dropped
        (7, 3, 1, [0, 1, 1, 1, 2, 2, 2]),
        (3, 8, 0, [0, 0, 0]),
        (3, 1, 0, [0, 1, 2]),
        (2, 8, 2, [0, 1]),
        (0, 8, 0, []),
    ],
)
def test_average_pool(n: int, stride: int, protect: int, expected: list[int]) -> None:
    token_map = AveragePool(stride)(TokenContext(torch.randn(2, n, 3), protect=protect))
    assert token_map.assign.tolist() == [expected] * 2
    assert token_map.n_out == len({slot for slot in expected if slot >= 0})


def test_average_pool_published() -> None:
    """Stride 8 on 24 x 24 tokens: strips of 1 x 8, three to a row."""
    x = torch.randn(2, 576, 4)
    merged, size = AveragePool()(TokenContext(x)).merge(x)
    torch.testing.assert_close(merged, x.view(2, 24, 3, 8, 4).mean(3).flatten(1, 2))
    assert (size == 8).all()
    with pytest.raises(ValueError, match="stride must be at least 1, got 0"):
        AveragePool(0)
    with pytest.raises(TypeError, match="stride must be an int"):
        AveragePool(0.5)


# ---- FourierPool ----------------------------------------------------------------------------------------------------


def test_fourier_pool_four_to_two() -> None:
    """One row of 4 tokens to 2. The first coefficients of 4 points are (1, 1, 1, 1) / 2 and sqrt(1/2) times the cosines
    of 22.5, 67.5, 112.5 and 157.5 degrees, 0.653281, 0.270598, and their negatives; the inverse of 2 points is their
    sum and difference over sqrt(2): (0.5 + 0.653281) * 0.707107 = 0.815493, and so on."""
    reduction = FourierPool((1, 2))(TokenContext(torch.randn(1, 4, 3), grid=(1, 1, 4)))
    first = [0.815493, 0.544895, 0.162212, -0.108386]
    torch.testing.assert_close(reduction.dense()[0], torch.tensor([first, first[::-1]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("gain", "weight"), [("ortho", 0.5), ("raw", 1.0), ("mean", 0.25)])
def test_fourier_pool_to_one(gain: str, weight: float) -> None:
    """2 x 2 tokens to 1: (1, 1) / sqrt(2) along both axes, and the inverse of one point is itself."""
    reduction = FourierPool(1, gain)(TokenContext(torch.randn(1, 4, 3), grid=(1, 2, 2)))
    torch.testing.assert_close(reduction.dense()[0], torch.full((1, 4), weight))


@pytest.mark.parametrize(("gain", "growth"), [("ortho", 2.0), ("raw", 4.0), ("mean", 1.0)])
def test_fourier_pool_of_a_constant(gain: str, growth: float) -> None:
    x = torch.full((2, 576, 3), 1.5)
    merged, _ = FourierPool(gain=gain)(TokenContext(x, grid=(1, 24, 24))).merge(x)
    torch.testing.assert_close(merged, torch.full((2, 144, 3), 1.5 * growth))


def published_fourier(x: numpy.ndarray, k: tuple[int, int]) -> numpy.ndarray:
    """``x[h,w,C]``: the transform of each axis term by term, cut, and back."""

    def wave(n: int, frequency: int, place: int) -> float:
        scale = math.sqrt((1 if frequency == 0 else 2) / n)
        return scale * math.cos(math.pi * frequency * (2 * place + 1) / (2 * n))

    for axis in (0, 1):
        n, m = x.shape[axis], k[axis]
        x = numpy.moveaxis(x, axis, 0)
        coefficients = [sum(wave(n, f, i) * x[i] for i in range(n)) for f in range(m)]
        x = numpy.stack([sum(wave(m, f, i) * coefficients[f] for f in range(m)) for i in range(m)])
        x = numpy.moveaxis(x, 0, axis)
    return x


@pytest.mark.parametrize(
    ("grid", "keep", "sides"),
    [
        ((1, 6, 8), (3, 5), (3, 5)),
        ((1, 6, 8), 12, (3, 4)),  # a quarter: half of each side
        ((1, 6, 8), 0.25, (3, 4)),
        ((1, 6, 9), 4 / 9, (4, 6)),  # two thirds of each side
        ((2, 6, 6), 0.5, (4, 4)),  # 4.24
        ((3, 4, 4), 27, (3, 3)),
        ((1, 5, 7), 1, (1, 1)),
        ((1, 6, 8), (6, 5), (6, 5)),
    ],
)
def test_fourier_pool_published_steps(grid: tuple[int, int, int], keep: Any, sides: tuple[int, int]) -> None:
    t, h, w = grid
    x = torch.randn(2, t * h * w + 1, 3)
    reduction = FourierPool(keep)(TokenContext(x, grid=grid, protect=1))
    merged, _ = reduction.merge(x)
    assert torch.equal(merged[:, 0], x[:, 0])
    frames = x[:, 1:].double().view(2, t, h, w, 3).flatten(0, 1).numpy()
    expected = numpy.stack([published_fourier(frame, sides) for frame in frames])
    torch.testing.assert_close(
        merged[:, 1:].double(), torch.from_numpy(expected).reshape(2, -1, 3), rtol=1e-5, atol=1e-5
    )


def test_fourier_pool_identity_and_errors() -> None:
    ctx = TokenContext(torch.randn(1, 48, 3), grid=(1, 6, 8))
    for keep in (48, 99, 1.0, (6, 8)):
        assert FourierPool(keep)(ctx).assign.tolist() == [list(range(48))]
    with pytest.raises(ValueError, match=r"keep must be at most the grid's \(6, 8\), got \(7, 8\)"):
        FourierPool((7, 8))(ctx)
    with pytest.raises(ValueError, match=r"keep as a tuple must be \(h, w\), both at least 1, got \(0, 2\)"):
        FourierPool((0, 2))
    with pytest.raises(ValueError, match=r"keep as a tuple must be \(h, w\), got \(1, 2, 3\)"):
        FourierPool((1, 2, 3))
    with pytest.raises(ValueError, match="gain must be one of 'ortho', 'raw', 'mean'; got 'none'"):
        FourierPool(gain="none")
