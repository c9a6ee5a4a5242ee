"""FasterVLM, VTC-CLS, FoPru and HiPrune on literal cases, worked out by hand next to each, and against the published
steps written out token by token."""

import math
from typing import Any

import pytest
import torch
from fastok.reducers import VTCCLS, FasterVLM, FoPru, HiPrune, TokenContext
from torch import Tensor


def context(n: int, grid: tuple[int, int, int] | None = None, **scores: list[float] | Tensor) -> TokenContext:
    named = {name.replace("_", ":"): torch.as_tensor(row)[None] for name, row in scores.items()}
    return TokenContext(torch.randn(1, n, 4), scores=named, grid=grid)


def kept(reducer: Any, ctx: TokenContext) -> list[int]:
    token_map = reducer(ctx)
    assert token_map.counts.tolist() == [token_map.n_out]
    return token_map.representative[0].tolist()


def best(scores: list[float], k: int) -> list[int]:
    """The k highest, NaN last, ties to the lowest index."""
    return sorted(range(len(scores)), key=lambda i: (math.isnan(scores[i]), -scores[i], i))[:k]


# ---- FasterVLM and VTC-CLS ------------------------------------------------------------------------------------------


# 0.3 stands at 1 and 3, 0.2 at 2; of 6 tokens a quarter is 1.5, rounded to 2, three quarters 4.5, to 4.
@pytest.mark.parametrize(
    ("keep", "expected"),
    [(1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (0.25, [1, 3]), (0.75, [0, 1, 2, 3]), (6, list(range(6))), (0.01, [1])],
)
def test_fastervlm(keep: float, expected: list[int]) -> None:
    ctx = context(6, cls=[0.1, 0.3, 0.2, 0.3, 0.05, 0.05])
    assert kept(FasterVLM(keep), ctx) == expected
    assert kept(VTCCLS(keep), ctx) == expected


def test_fastervlm_published_budgets() -> None:
    """0.5, 0.25, 0.1 and 0.05 of 576: 288, 144, 57.6 and 28.8, published as 288, 144, 58 and 29."""
    ctx = context(576, cls=torch.rand(576))
    assert [FasterVLM(keep)(ctx).n_out for keep in (0.5, 0.25, 0.1, 0.05)] == [288, 144, 58, 29]
    assert FasterVLM()(ctx).n_out == 144


def test_vtccls_layers() -> None:
    """Layers start to 22 of 24: the slice start:-1 of the published code."""
    assert VTCCLS(start=14).score_layers(24) == {"cls": tuple(range(14, 23))}
    assert VTCCLS(start=0).score_layers(24)["cls"] == tuple(range(23))
    assert VTCCLS(start=22).score_layers(24)["cls"] == (22,)
    assert VTCCLS().score_layers(24)["cls"] == tuple(range(12, 23))
    assert VTCCLS().score_layers(3)["cls"] == (1,)
    assert VTCCLS().score_layers(1)["cls"] == (0,)
    for start in (23, 1.0):
        with pytest.raises(ValueError, match=r"start must be within \[0, 23\) for an encoder of 24 layers"):
            VTCCLS(start=start).score_layers(24)
    with pytest.raises(ValueError, match="start must be within"):
        VTCCLS(start=-1)
    with pytest.raises(TypeError, match="start must be an int"):
        VTCCLS(start="later")


# ---- FoPru ----------------------------------------------------------------------------------------------------------

# Rows of a 3 x 4 grid with the sums 10, 12 and 11; the highest scores are 9, 8 and 7 at 0, 11 and 4.
ROWS = [9.0, 0.0, 0.0, 1.0, 7.0, 1.0, 2.0, 2.0, 1.0, 1.0, 1.0, 8.0]


@pytest.mark.parametrize(
    ("reducer", "expected"),
    [
        (FoPru(3), [0, 4, 11]),
        (FoPru(0.25), [0, 4, 11]),
        (FoPru(0.33), [0, 4, 11]),  # 3.96, rounded down
        (FoPru(5), [0, 4, 6, 7, 11]),
        (FoPru(4, "row"), [4, 5, 6, 7]),
        (FoPru(7, "row"), [4, 5, 6, 7]),  # one whole row fits
        (FoPru(8, "row"), [4, 5, 6, 7, 8, 9, 10, 11]),
        (FoPru(0.7, "row"), [4, 5, 6, 7, 8, 9, 10, 11]),  # 8.4 tokens
        (FoPru(12, "row"), list(range(12))),
        (FoPru(99, "row"), list(range(12))),
    ],
    ids=repr,
)
def test_fopru(reducer: FoPru, expected: list[int]) -> None:
    assert kept(reducer, context(12, (1, 3, 4), column=ROWS)) == expected


def test_fopru_rows_of_frames_and_nan() -> None:
    scores = torch.tensor(ROWS).repeat(2)
    scores[5] = torch.nan  # the best row of the first frame
    # 12 in the second frame, then 11 in both, of which the first is taken.
    assert kept(FoPru(8, "row"), context(24, (2, 3, 4), column=scores)) == [8, 9, 10, 11, 16, 17, 18, 19]


def test_fopru_errors() -> None:
    with pytest.raises(ValueError, match="strategy must be one of 'rank', 'row'; got 'column'"):
        FoPru(strategy="column")
    with pytest.raises(ValueError, match="keep must be at least one row of 4 tokens, got 3, which is 3"):
        FoPru(3, "row")(context(12, (1, 3, 4), column=ROWS))
    with pytest.raises(ValueError, match="FoPru needs grid: TokenContext"):
        FoPru(4, "row")(context(12, column=ROWS))
    with pytest.raises(ValueError, match="grid must have as many places as there are unprotected tokens, 12"):
        FoPru(4, "row")(context(12, (1, 3, 3), column=ROWS))
    assert (FoPru().needs, FoPru(strategy="row").needs) == (("column",), ("column", "grid"))


# ---- HiPrune --------------------------------------------------------------------------------------------------------

DEEP = [0.01 * i for i in range(16)]  # the later the better


# A 4 x 4 grid; keep 8 and alpha 0.625 make round(8 * 0.625 / 5) = 1 anchor.
@pytest.mark.parametrize(
    ("anchor", "compat", "expected"),
    [
        # Neighbours 3, 11, 6; four registers 15, 14, 13, 12.
        (7, False, [3, 6, 7, 11, 12, 13, 14, 15]),
        # As released also 8, at the start of the next row; three registers.
        (7, True, [3, 6, 7, 8, 11, 13, 14, 15]),
        # Neighbours 1, 4; five registers.
        (0, False, [0, 1, 4, 11, 12, 13, 14, 15]),
        # As released 0 - 1 and 0 - 4 are 0.
        (0, True, [0, 1, 4, 11, 12, 13, 14, 15]),
        # Neighbours 9, 12, 14; registers 15, 11, 10, 8.
        (13, False, [8, 9, 10, 11, 12, 13, 14, 15]),
        (2, True, [0, 1, 2, 3, 6, 13, 14, 15]),  # 2 - 4 is 0 as released
        (2, False, [1, 2, 3, 6, 12, 13, 14, 15]),
    ],
)
def test_hiprune(anchor: int, compat: bool, expected: list[int]) -> None:
    middle = [0.5 if i == anchor else 0.01 for i in range(16)]
    ctx = context(16, (1, 4, 4), column_mid=middle, column_deep=DEEP)
    assert kept(HiPrune(8, 0.625, compat=compat), ctx) == expected


def published_hiprune(middle: list[float], deep: list[float], width: int, total: int, alpha: float) -> list[int]:
    """As released: neighbours in raster order, clamped, and 1 subtracted from the deep score of what is in already."""
    n, deep = len(deep), list(deep)
    anchors = best(middle, round(total * alpha / 5))
    around = {min(max(i + step, 0), n - 1) for i in anchors for step in (-1, 1, -width, width)}
    inside = set(anchors) | around
    for i in inside:
        deep[i] -= 1
    return sorted(inside | set(best(deep, total - len(inside))))


@pytest.mark.parametrize(("total", "alpha"), [(192, 0.1), (128, 0.1), (64, 0.1), (64, 0.5), (576 - 1, 1.0)])
def test_hiprune_as_released(total: int, alpha: float) -> None:
    middle, deep = (torch.rand(576).softmax(0) for _ in range(2))
    ctx = context(576, (1, 24, 24), column_mid=middle, column_deep=deep)
    expected = published_hiprune(middle.tolist(), deep.tolist(), 24, total, alpha)
    assert kept(HiPrune(total, alpha, compat=True), ctx) == expected


def test_hiprune_neighbours_stay_in_their_row_and_frame() -> None:
    """Without ``compat`` against a walk over the grid of each frame."""
    t, h, w = 3, 4, 5
    middle, deep = torch.rand(60), torch.rand(60)
    inside = set()
    for i in best(middle.tolist(), round(30 * 0.8 / 5)):
        frame, y, x = i // 20, i // 5 % 4, i % 5
        inside.add(i)
        for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            if 0 <= y + dy < h and 0 <= x + dx < w:
                inside.add(frame * 20 + (y + dy) * 5 + x + dx)
    rest = [-9.0 if i in inside else score for i, score in enumerate(deep.tolist())]
    ctx = context(60, (t, h, w), column_mid=middle, column_deep=deep)
    assert kept(HiPrune(30, 0.8), ctx) == sorted(inside | set(best(rest, 30 - len(inside))))


def test_hiprune_budgets_and_layers() -> None:
    scores = torch.rand(5, 16)
    names = ("column:mid", "column:deep")
    ctx = TokenContext(torch.randn(5, 16, 4), scores=dict.fromkeys(names, scores), grid=(1, 4, 4))
    ctx.extra["crops"] = torch.tensor([2, 2])
    assert HiPrune(42)(ctx).n_out == 8  # 42 // 5 for each crop
    assert HiPrune(0.334)(ctx).n_out == 5  # 5.344
    ctx.extra["crops"] = torch.tensor([1, 2])
    with pytest.raises(ValueError, match="1 x 2 crops and a thumbnail are B=3 samples; got 5"):
        HiPrune(42)(ctx)
    assert HiPrune().score_layers(24) == {"column:mid": (8,)}
    assert HiPrune().score_layers(32) == {"column:mid": (15,)}
    assert HiPrune(layer=3).score_layers(24) == {"column:mid": (2,)}
    assert HiPrune().score_layers(1) == {"column:mid": (0,)}
    # More neighbours than tokens asked for: the anchor first.
    tight = context(16, (1, 4, 4), column_mid=[0.5 if i == 5 else 0.1 for i in range(16)], column_deep=DEEP)
    assert kept(HiPrune(3, 1.0), tight) == [1, 4, 5]
    for bad, message in (({"alpha": 1.5}, r"alpha must be within \[0, 1\]"), ({"layer": 0}, "layer must be within")):
        with pytest.raises(ValueError, match=message):
            HiPrune(**bad)
