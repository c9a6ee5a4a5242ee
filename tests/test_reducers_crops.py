"""HiRED, GlobalCom² and TokenCorr, which give each crop of an image its own budget: literal cases, worked out by hand
next to each, and the published steps written out crop by crop."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastok import TokenMap
from fastok.reducers import GlobalCom2, HiRED, TokenContext, TokenCorr
from torch import Tensor


def context(scores: dict[str, Tensor], grid: tuple[int, int, int], crops: tuple[int, int], **more: Any) -> TokenContext:
    batch, n = next(iter(scores.values())).shape
    extra = {"crops": torch.tensor(crops), **more}
    return TokenContext(torch.randn(batch, n, 4), scores=scores, grid=grid, extra=extra)


def slots(token_map: TokenMap) -> list[list[int]]:
    """For each crop its tokens, by slot."""
    rows = token_map.representative.tolist()
    found = [row[:count] for row, count in zip(rows, token_map.counts.tolist(), strict=True)]
    assert all(row[count:] == [-1] * (token_map.n_out - count) for row, count in zip(rows, map(len, found)))  # noqa: B905
    return found


def best(scores: list[float], k: int) -> list[int]:
    """The k highest, NaN last, ties to the lowest index."""
    return sorted(range(len(scores)), key=lambda i: (math.isnan(scores[i]), -scores[i], i))[:k]


# ---- HiRED ----------------------------------------------------------------------------------------------------------


def hired_case() -> dict[str, Tensor]:
    """A thumbnail and 2 x 2 crops of 4 x 4 tokens. Early, the thumbnail's column 0 and 1, 5, 9 and 15 are looked at."""
    early = torch.zeros(5, 16)
    early[0, [0, 4, 8, 12, 1, 5, 9, 15]] = torch.arange(8.0, 0.0, -1)
    late = torch.linspace(1, 0.1, 16).repeat(5, 1)
    late[3] = late[3].flip(0)
    return {"cls": late, "cls:early": early}


def test_hired_by_blocks_of_the_thumbnail() -> None:
    """20 of 80 tokens, 10 for the thumbnail, 10 shared: of the 8 looked at, the blocks have 4, 0, 3 and 1, which makes
    10 * 4 / 8 = 5, 0, 3.75 and 1.25, rounded down. Late scores fall, but in crop 3 (the block below left) they rise."""
    token_map = HiRED(keep=0.25)(context(hired_case(), (1, 4, 4), (2, 2)))
    assert slots(token_map) == [list(range(10)), [0, 1, 2, 3, 4], [], [13, 14, 15], [0]]
    assert slots(HiRED(keep=20)(context(hired_case(), (1, 4, 4), (2, 2)))) == slots(token_map)


@pytest.mark.parametrize("reducer", [HiRED(keep=0.25, compat=True), HiRED(keep=0.25, region="bands")], ids=repr)
def test_hired_by_bands_as_released(reducer: HiRED) -> None:
    """Bands of 4 consecutive tokens, the rows here: 0 and 1; 4 and 5; 8 and 9; 12 and 15: two each, 2.5 tokens."""
    found = slots(reducer(context(hired_case(), (1, 4, 4), (2, 2))))
    assert found == [list(range(10)), [0, 1], [0, 1], [14, 15], [0, 1]]


def test_hired_without_crops() -> None:
    """LLaVA-1.5: int(16 * 0.35) = 5 tokens of every image, by the late score alone."""
    late = hired_case()["cls"]
    for extra in ({}, {"crops": torch.zeros(2, dtype=torch.int64)}):
        found = slots(HiRED(keep=0.35)(TokenContext(torch.randn(5, 16, 4), scores={"cls": late}, extra=extra)))
        assert found == [[0, 1, 2, 3, 4]] * 3 + [[11, 12, 13, 14, 15], [0, 1, 2, 3, 4]]


def published_hired(
    late: Tensor, early: Tensor, crops: tuple[int, int], side: int, rate: float, alpha: float, bands: bool
) -> list[list[int]]:
    count, n = len(late), side * side
    total = int(count * n * rate)
    full = min(int(total * alpha), n)
    sub = min(total - full, (count - 1) * n)
    looked_at = best(early[0].tolist(), int(n * (1 - alpha)))
    rows, columns = crops
    hits = [0] * (count - 1)
    for i in looked_at:
        y, x = divmod(i, side)
        block = (y // (side // rows)) * columns + x // (side // columns)
        hits[i // (n // (count - 1)) if bands else block] += 1
    budgets = [full] + [min(sub * h // len(looked_at), n) for h in hits]
    return [sorted(best(row.tolist(), budget)) for row, budget in zip(late, budgets, strict=True)]


@pytest.mark.parametrize("crops", [(2, 2), (1, 3), (3, 1), (1, 2)])
@pytest.mark.parametrize("bands", [False, True])
@pytest.mark.parametrize(("rate", "alpha"), [(0.2, 0.5), (0.4, 0.5), (0.4, 0.1), (0.7, 0.9), (0.05, 0.3)])
def test_hired_published_steps(crops: tuple[int, int], bands: bool, rate: float, alpha: float) -> None:
    late, early = (torch.rand(1 + crops[0] * crops[1], 144).softmax(1) for _ in range(2))
    early[0] += torch.rand(12, 1).expand(12, 12).flatten() * 0.02
    ctx = context({"cls": late, "cls:early": early}, (1, 12, 12), crops)
    found = slots(HiRED(rate, alpha, compat=bands)(ctx))
    assert found == published_hired(late, early, crops, 12, rate, alpha, bands)


def test_hired_errors_and_identity() -> None:
    ctx = context(hired_case(), (1, 4, 4), (2, 2))
    assert HiRED(keep=80)(ctx).n_out == HiRED(keep=1.0)(ctx).n_out == 16
    assert HiRED().score_layers(24) == {"cls:early": (0,)}
    with pytest.raises(ValueError, match="region must be 'grid', 'bands' or None, got 'quadrants'"):
        HiRED(region="quadrants")
    with pytest.raises(ValueError, match=r"alpha must be within \[0, 1\], got 2"):
        HiRED(alpha=2)
    with pytest.raises(ValueError, match=r'HiRED needs scores\["cls:early"\]'):
        HiRED()(context({"cls": torch.rand(5, 16)}, (1, 4, 4), (2, 2)))


# ---- GlobalCom² -----------------------------------------------------------------------------------------------------


def globalcom2_case(compat: bool) -> TokenContext:
    """1 x 2 crops of 4 x 4 tokens; the thumbnail's columns score 0, 1, 2 and 6; the crops' own scores are all equal."""
    scores = torch.ones(3, 16)
    scores[0] = torch.tensor([0.0, 1.0, 2.0, 6.0]).repeat(4)
    return context({"cls:logit" if compat else "cls": scores}, (1, 4, 4), (1, 2))


@pytest.mark.parametrize("compat", [False, True])
def test_globalcom2(compat: bool) -> None:
    """Thumbnail: 8 of 16, best first: column 3, then column 2.

    Crops: the halves of the thumbnail sum to 4 * 1 = 4 and 4 * 8 = 32, so p = softmax(-2.8, 0) = 0.0573, 0.9427, and
    the crops keep 0.5 * (1 - 0.4427) = 0.2787 and 0.5 * (1 + 0.4427) = 0.7213 of 16: 4.46 and 11.54, rounded down.
    Resized to 8 columns, the thumbnail's scores are 0, 0.25, 0.75, 1.25 | 1.75, 3, 5, 6 (between columns a and b first
    3/4 a + 1/4 b, then the other way round). The first crop keeps its last column, the second all of its last two and
    three of its second one.
    """
    found = slots(GlobalCom2(keep=0.5, compat=compat)(globalcom2_case(compat)))
    assert found[0] == [3, 7, 11, 15, 2, 6, 10, 14]
    assert found[1] == [3, 7, 11, 15]
    assert found[2] == [1, 2, 3, 5, 6, 7, 9, 10, 11, 14, 15]


def test_globalcom2_with_padding() -> None:
    """The outer columns of the crops are padding: 12 tokens each, 3.34 and 8.66 kept; the thumbnail is resized to the 6
    columns within: at 4/6 of a column each, -1/6 (0), 1/2, 7/6 | 11/6, 5/2, 19/6 (3) are 0, 1/2, 7/6 | 11/6, 4, 6."""
    ctx = globalcom2_case(False)
    valid = torch.ones(3, 4, 4, dtype=torch.bool)
    valid[1, :, 0] = valid[2, :, 3] = False
    ctx.extra["valid"] = valid.flatten(1)
    found = slots(GlobalCom2(keep=0.5)(ctx))
    assert found[1:] == [[3, 7, 11], [1, 2, 5, 6, 9, 10, 13, 14]]


def published_globalcom2(
    scores: Tensor, crops: tuple[int, int], side: int, rate: float, temperature: float, valid: Tensor
) -> list[list[int]]:
    """One crop after the other, with PyTorch's own resizing of the thumbnail."""
    rows, columns = crops
    g = scores[0].view(side, side).double()
    h, w = side // rows, side // columns
    sums = [float(g[r * h : (r + 1) * h, c * w : (c + 1) * w].sum()) for r in range(rows) for c in range(columns)]
    weights = [math.exp((s - max(sums)) / temperature) for s in sums]
    p = [weight / sum(weights) for weight in weights]
    mean = sum(p) / len(p)
    stitched = valid[1:].view(rows, columns, side, side).transpose(1, 2).reshape(rows * side, columns * side)
    ys, xs = stitched.any(1).nonzero()[:, 0].tolist(), stitched.any(0).nonzero()[:, 0].tolist()
    resized = F.interpolate(g[None, None], size=(len(ys), len(xs)), mode="bilinear", align_corners=False)[0, 0]
    found = [best(scores[0].tolist(), int(side * side * rate))]
    for c in range(rows * columns):
        own, seen, tokens = [], [], []
        for i in range(side * side):
            if not valid[1 + c, i]:
                continue
            y, x = c // columns * side + i // side, c % columns * side + i % side
            own.append(float(scores[1 + c, i]))
            seen.append(float(resized[ys.index(y), xs.index(x)]))
            tokens.append(i)
        norms = [math.sqrt(sum(s * s for s in row)) for row in (own, seen)]
        combined = [a / norms[0] + b / norms[1] for a, b in zip(own, seen, strict=True)]
        count = int(len(tokens) * min(1.0, rate * (1 + p[c] - mean)))
        found.append(sorted(tokens[i] for i in best(combined, count)))
    return found


@pytest.mark.parametrize("crops", [(2, 2), (1, 3), (3, 1), (1, 1)])
@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize(("rate", "temperature"), [(0.25, 10.0), (0.1, 10.0), (0.6, 0.5), (0.9, 0.1)])
def test_globalcom2_published_steps(crops: tuple[int, int], padding: int, rate: float, temperature: float) -> None:
    rows, columns = crops
    scores = torch.rand(1 + rows * columns, 144)
    stitched = torch.ones(rows * 12, columns * 12, dtype=torch.bool)
    if padding:
        stitched[:padding] = stitched[-padding:] = False
    valid = stitched.view(rows, 12, columns, 12).transpose(1, 2).reshape(-1, 144)
    valid = torch.cat([torch.ones(1, 144, dtype=torch.bool), valid])
    ctx = context({"cls": scores}, (1, 12, 12), crops, valid=valid)
    found = slots(GlobalCom2(rate, temperature)(ctx))
    assert found == published_globalcom2(scores, crops, 12, rate, temperature, valid)


def test_globalcom2_without_crops_and_errors() -> None:
    scores = torch.tensor([[0.1, 0.4, 0.4, 0.2], [0.3, 0.1, torch.nan, 0.2]])
    token_map = GlobalCom2(keep=3)(TokenContext(torch.randn(2, 4, 3), scores={"cls": scores}))
    assert slots(token_map) == [[1, 2, 3], [0, 3, 1]]
    assert slots(GlobalCom2(keep=0.5)(TokenContext(torch.randn(2, 4, 3), scores={"cls": scores}))) == [[1, 2], [0, 3]]
    assert GlobalCom2().needs == ("cls", "grid", "crops", "valid")
    assert GlobalCom2(compat=True).needs[0] == "cls:logit"
    assert GlobalCom2().score_layers(24) == {"cls": (-1,)}
    assert GlobalCom2(compat=True).score_layers(24) == {"cls:logit": (-1,)}
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        GlobalCom2(temperature=0)
    ctx = globalcom2_case(False)
    ctx.extra["valid"] = torch.ones(3, 16)
    with pytest.raises(TypeError, match=r'extra\["valid"\] must be bool, got torch.float32'):
        GlobalCom2()(ctx)
    ctx.extra = {"crops": torch.ones(3)}
    with pytest.raises(ValueError, match=r'extra\["crops"\] must be \(rows, columns\), got shape \[3\]'):
        GlobalCom2()(ctx)


# ---- TokenCorr ------------------------------------------------------------------------------------------------------


def test_tokencorr() -> None:
    """10 tokens: 0, 1, 2 have the same keys and so two partners each, more than 0.1 * 10; 3 and 4 have one; the rest
    have none. 7 are left: 4 by the late score (9, 8, 7, 6), 3 by the middle one among the others (2, 0, 5)."""
    keys = torch.eye(10)
    keys[1] = keys[2] = 2 * keys[0]
    keys[4] = keys[3]
    late = torch.arange(10.0)
    middle = torch.tensor([5.0, 1.0, 6.0, 0.0, 2.0, 4.0, 9.0, 9.0, 9.0, 9.0])
    ctx = TokenContext(
        torch.randn(1, 10, 4), keys.view(1, 10, 2, 5), scores={"cls": late[None], "cls:mid": middle[None]}
    )
    assert slots(TokenCorr()(ctx)) == [[0, 2, 5, 6, 7, 8, 9]]
    # Where one partner is too many, 3 and 4 are redundant, too. 5 are left: 9, 8, 7; then 6 and 2.
    assert slots(TokenCorr(partners=0.0)(ctx)) == [[2, 6, 7, 8, 9]]


def published_tokencorr(keys: Tensor, late: Tensor, middle: Tensor, similarity: float, partners: float) -> list[int]:
    flat = keys.flatten(1).double()
    n = len(flat)
    redundant = 0
    for i in range(n):
        alike = sum(float(F.cosine_similarity(flat[i], flat[j], dim=0)) > similarity for j in range(n) if j != i)
        redundant += alike > partners * n
    count = max(n - redundant, 1)
    first = best(late.tolist(), count - count // 2)
    rest = [math.nan if i in first else score for i, score in enumerate(middle.tolist())]
    return sorted(first + best(rest, count // 2))


@pytest.mark.parametrize(("similarity", "partners"), [(0.9, 0.1), (0.5, 0.1), (0.5, 0.3), (-0.9, 0.1)])
def test_tokencorr_published_steps(similarity: float, partners: float) -> None:
    keys = torch.randn(3, 1, 2, 4) + torch.rand(3, 1, 1, 1) * torch.randn(3, 40, 2, 4)
    late, middle = torch.rand(3, 40), torch.rand(3, 40)
    ctx = TokenContext(torch.randn(3, 40, 4), keys, scores={"cls": late, "cls:mid": middle})
    found = slots(TokenCorr(similarity, partners)(ctx))
    assert found == [
        published_tokencorr(k, a, m, similarity, partners) for k, a, m in zip(keys, late, middle, strict=True)
    ]


def test_tokencorr_rows_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = TokenContext(
        torch.randn(2, 50, 4), torch.randn(2, 50, 1, 3), scores={"cls": torch.rand(2, 50), "cls:mid": torch.rand(2, 50)}
    )
    at_once = slots(TokenCorr(0.5)(ctx))
    monkeypatch.setattr("fastok.reducers.tokencorr._ROWS", 7)
    assert slots(TokenCorr(0.5)(ctx)) == at_once
    assert {len(row) for row in at_once} != {50}


def test_tokencorr_layers_and_errors() -> None:
    assert TokenCorr().score_layers(24) == {"cls:mid": (12,)}
    with pytest.raises(ValueError, match=r"similarity must be within \[-1, 1\], got 1.5"):
        TokenCorr(1.5)
    with pytest.raises(ValueError, match=r"partners must be within \[0, 1\], got -0.1"):
        TokenCorr(partners=-0.1)
    with pytest.raises(
        ValueError, match=r"keys must be \[B,N,G,D\] for hidden \[B,N,C\], here B=1, N=4; got \[1, 4, 8\]"
    ):
        TokenCorr()(TokenContext(torch.randn(1, 4, 2), torch.randn(1, 4, 8)))
