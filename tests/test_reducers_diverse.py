"""DivPrune, ToDRE and MMTok: literal cases on vectors in the plane, worked out by hand next to each, and against the
published greedy steps written out with Python numbers."""

import math
from typing import Any

import pytest
import torch
from fastok import TokenMap
from fastok.reducers import DivPrune, MMTok, ToDRE, TokenContext
from torch import Tensor


def plane(*degrees: float) -> Tensor:
    """``[1,N,2]``: vectors at these angles, of lengths 1, 2, 3, …, which must not matter."""
    angle = torch.tensor(degrees).deg2rad()
    return (torch.stack([angle.cos(), angle.sin()], 1) * torch.arange(1.0, len(degrees) + 1)[:, None])[None]


def kept(token_map: TokenMap) -> list[list[int]]:
    rows = token_map.representative.tolist()
    return [row[:count] for row, count in zip(rows, token_map.counts.tolist(), strict=True)]


def cosine(a: list[float], b: list[float]) -> float:
    norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norms if norms else 0.0


def greedy(x: list[list[float]], k: int, first: int, objective: str) -> list[int]:
    """The published loop: the token farthest from those picked, by 1 - cosine."""
    picks = [first]
    while len(picks) < k:
        rest = [i for i in range(len(x)) if i not in picks]
        combine = min if objective == "max_min" else math.fsum
        value = {i: combine([1 - cosine(x[i], x[j]) for j in picks]) for i in rest}
        picks.append(max(rest, key=lambda i: (value[i], -i)))
    return sorted(picks)


def isolated(x: list[list[float]]) -> int:
    """DivPrune's first pick: the second smallest distance of each column (the smallest is its own 0), the largest."""
    nearest = [min(1 - cosine(a, b) for j, b in enumerate(x) if j != i) for i, a in enumerate(x)]
    return max(range(len(x)), key=lambda i: (nearest[i], -i))


# ---- DivPrune -------------------------------------------------------------------------------------------------------


# At 0, 10, 20, 90 and 180 degrees the nearest others are 10, 10, 10, 70 and 90 degrees away: 180 first. Farthest from
# it is 0; from both, 90 (10 and 20 are 10 and 20 degrees from 0); then 20, which is 20 degrees away, and 10.
@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (1, [4]),
        (2, [0, 4]),
        (3, [0, 3, 4]),
        (4, [0, 2, 3, 4]),
        (5, [0, 1, 2, 3, 4]),
        (0.5, [0, 4]),
        (0.7, [0, 2, 3, 4]),
    ],
)
def test_divprune(keep: float, expected: list[int]) -> None:
    """Half of 5 is 2.5, rounded to 2; 0.7 of it 3.5, to 4."""
    x = plane(0, 10, 20, 90, 180)
    assert kept(DivPrune(keep)(TokenContext(x))) == [expected]
    assert kept(DivPrune(keep, compat=True)(TokenContext(x))) == [expected]


def test_divprune_duplicates() -> None:
    """Two of each of (1, 0) and (0, 1): every token's nearest other is at 0, so the first token is first, then 2, the
    first of the other kind. Then all are at 0 from one picked: released code picks token 0 again."""
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]])
    assert kept(DivPrune(2)(TokenContext(x))) == [[0, 2]]
    assert kept(DivPrune(3)(TokenContext(x))) == [[0, 1, 2]]
    assert kept(DivPrune(3, compat=True)(TokenContext(x))) == [[0, 2]]


def test_divprune_padding() -> None:
    """Token 4 (180 degrees) is padding: of the others, 90 is the most isolated (70 from 20), then 0, then 20."""
    ctx = TokenContext(plane(0, 10, 20, 90, 180), extra={"valid": torch.tensor([[True, True, True, True, False]])})
    for keep, expected in ((2, [0, 3]), (3, [0, 2, 3]), (0.5, [0, 3]), (0.65, [0, 2, 3])):  # of 4: 2 and 2.6
        assert kept(DivPrune(keep)(ctx)) == [expected]
        assert kept(DivPrune(keep, compat=True)(ctx)) == [expected]
    for keep in (4, 5, 99, 1.0):
        assert kept(DivPrune(keep)(ctx)) == [[0, 1, 2, 3]]


def test_divprune_padding_makes_it_ragged() -> None:
    x = torch.randn(3, 20, 5)
    valid = torch.arange(20) < torch.tensor([[20], [11], [1]])
    token_map = DivPrune(0.5)(TokenContext(x, extra={"valid": valid}))
    assert token_map.counts.tolist() == [10, 6, 1]  # 5.5 to the even 6, 0.5 to the least, 1
    for row, tokens, n in zip(kept(token_map), x.tolist(), (20, 11, 1), strict=True):
        assert row == greedy(tokens[:n], len(row), isolated(tokens[:n]) if n > 1 else 0, "max_min")


@pytest.mark.parametrize("k", [1, 7, 39])
def test_divprune_published_steps(k: int) -> None:
    x = torch.randn(2, 40, 6)
    found = kept(DivPrune(k)(TokenContext(x)))
    assert found == [greedy(tokens, k, isolated(tokens), "max_min") for tokens in x.tolist()]
    assert kept(DivPrune(k, compat=True)(TokenContext(x))) == found


# ---- ToDRE ----------------------------------------------------------------------------------------------------------


# At 0 (the pivot), 80, 150 and 170 degrees: 170 is farthest from 0. Then 150 is 1.866 + 0.060 from both together and
# 0.060 from the nearer; 80 is 0.826 + 1 and 0.826.
@pytest.mark.parametrize(
    ("objective", "keep", "expected"),
    [
        ("max_sum", 1, [0]),
        ("max_sum", 2, [0, 3]),
        ("max_sum", 3, [0, 2, 3]),
        ("max_min", 3, [0, 1, 3]),
        ("max_min", 0.75, [0, 1, 3]),
        ("max_sum", 4, [0, 1, 2, 3]),
    ],
)
def test_todre(objective: str, keep: float, expected: list[int]) -> None:
    ctx = TokenContext(plane(0, 80, 150, 170), scores={"cls": torch.tensor([[0.9, 0.5, 0.6, 0.1]])})
    assert kept(ToDRE(keep, objective)(ctx)) == [expected]


def test_todre_starts_in_the_thumbnail() -> None:
    """4 tokens of a thumbnail and 4 of one crop. The highest score, 0.9, is in the crop; the thumbnail's is 0.5 at 1,
    at 80 degrees; farthest from it is 7, at 265."""
    x, scores = plane(0, 80, 150, 170, 10, 200, 90, 265), torch.full((1, 8), 0.1)
    scores[0, 1], scores[0, 6] = 0.5, 0.9
    ctx = TokenContext(x, scores={"cls": scores}, extra={"crops": torch.tensor([1, 1])})
    assert kept(ToDRE(2)(ctx)) == [[1, 7]]
    ctx.extra = {}
    assert kept(ToDRE(2)(ctx)) == [[6, 7]]  # 90, and 265 again
    ctx.extra = {"valid": torch.tensor([[True] * 6 + [False, True]]), "crops": torch.zeros(2, dtype=torch.int64)}
    assert kept(ToDRE(2)(ctx)) == [[1, 7]]
    ctx.extra = {"crops": torch.tensor([1, 2])}
    with pytest.raises(ValueError, match="1 x 2 crops and a thumbnail of 8 tokens"):
        ToDRE(2)(ctx)


@pytest.mark.parametrize("objective", ["max_sum", "max_min"])
@pytest.mark.parametrize("k", [1, 8, 39])
def test_todre_published_steps(objective: str, k: int) -> None:
    x, scores = torch.randn(2, 40, 6), torch.rand(2, 40)
    found = kept(ToDRE(k, objective)(TokenContext(x, scores={"cls": scores})))
    assert found == [
        greedy(tokens, k, row.index(max(row)), objective)
        for tokens, row in zip(x.tolist(), scores.tolist(), strict=True)
    ]


def test_todre_errors_and_place() -> None:
    with pytest.raises(ValueError, match="objective must be one of max_min, max_sum; got 'sum'"):
        ToDRE(objective="sum")
    assert (ToDRE.newlines, ToDRE.whole_image, DivPrune.whole_image) == ("none", True, True)
    ctx = TokenContext(torch.randn(1, 2880, 4), scores={"cls": torch.rand(1, 2880)})
    assert [ToDRE(keep)(ctx).n_out for keep in (0.1, 0.25)] == [288, 720]
    assert DivPrune()(TokenContext(torch.randn(1, 576, 4))).n_out == 56  # 56.4


# ---- MMTok ----------------------------------------------------------------------------------------------------------


def published_mmtok(
    x: list[list[float]], vision: list[list[float]], text: list[list[float]], k: int, reducer: MMTok, padding: set[int]
) -> list[int]:
    def shares(rows: list[list[float]], temperature: float, weight: float) -> list[list[float]]:
        found = []
        for row in rows:
            powers = [math.exp((value - max(row)) / temperature) for value in row]
            found.append([weight * power / sum(powers) / len(rows) for power in powers])
        return found

    table = shares([[cosine(t, a) for a in x] for t in text], reducer.tau_text, 1.0)
    table += shares([[cosine(a, b) for b in vision] for a in vision], reducer.tau_vision, reducer.alpha)
    covered, picks = [0.0] * len(table), []
    for _ in range(k):
        gains = {
            j: sum(max(0.0, row[j] - c) for row, c in zip(table, covered, strict=True))
            for j in range(len(x))
            if j not in picks and j not in padding
        }
        pick = max(gains, key=lambda j: (gains[j], -j))
        picks.append(pick)
        covered = [max(c, row[pick]) for row, c in zip(table, covered, strict=True)]
    return sorted(picks)


def test_mmtok() -> None:
    """Three kinds of image token, at 0, 90 and 180 degrees in the encoder: four, one and one of them, and one question
    word like the last. Softmax at these temperatures is even among equals and 0 elsewhere to 6 digits: the word gives
    token 5 a gain of 1, and its own row 0.5 / 6 more. Token 4 then adds 0.5 / 6; so does the first token of the four,
    whose rows have a quarter of 0.5 / 6 each. The rest adds nothing, so that the lowest index is next."""
    vision = plane(0, 0, 0, 0, 90, 180)
    ctx = TokenContext(plane(30, 40, 50, 60, 200, 300), text=plane(300), extra={"vision": vision})
    reducer = MMTok(1, tau_vision=0.02)
    assert kept(reducer(ctx)) == [[5]]
    assert kept(MMTok(3, tau_vision=0.02)(ctx)) == [[0, 4, 5]]
    assert kept(MMTok(4, tau_vision=0.02)(ctx)) == [[0, 1, 4, 5]]
    ctx.extra["valid"] = torch.tensor([[True, True, True, True, True, False]])
    assert 5 not in kept(MMTok(3, tau_vision=0.02)(ctx))[0]


@pytest.mark.parametrize("words", [1, 5])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("reducer", [MMTok(1), MMTok(8), MMTok(29), MMTok(12, 0.0), MMTok(12, 2.0, 0.1, 0.5)], ids=repr)
def test_mmtok_published_steps(words: int, padded: bool, reducer: MMTok) -> None:
    x, vision, text = torch.randn(2, 36, 6), torch.randn(2, 36, 5), torch.randn(1, words, 6)
    extra: dict[str, Any] = {"vision": vision}
    padding = set(range(0, 36, 6)) if padded else set()
    if padded:
        extra["valid"] = torch.tensor([i not in padding for i in range(36)]).expand(2, -1)
    found = kept(reducer(TokenContext(x, text=text, extra=extra)))
    expected = [
        published_mmtok(*rows, text[0].tolist(), int(reducer.keep), reducer, padding)
        for rows in zip(x.tolist(), vision.tolist(), strict=True)
    ]
    assert found == expected


def test_mmtok_budgets_and_errors() -> None:
    x, vision = torch.randn(1, 25, 4), torch.randn(1, 25, 3)
    ctx = TokenContext(x, text=torch.randn(1, 2, 4), extra={"vision": vision})
    assert MMTok(0.1)(ctx).n_out == 2  # 2.5, rounded down
    assert MMTok()(ctx).n_out == 25
    ctx.text = torch.randn(1, 0, 4)  # no question: the image alone
    assert kept(MMTok(5)(ctx)) == [published_mmtok(x[0].tolist(), vision[0].tolist(), [], 5, MMTok(), set())]
    ctx.text = torch.randn(1, 2, 5)
    with pytest.raises(ValueError, match=r"text must be \[B,m,C\] or \[1,m,C\], here B=1, C=4; got \[1, 2, 5\]"):
        MMTok()(ctx)
    ctx.extra = {}
    with pytest.raises(ValueError, match=r'MMTok needs extra\["vision"\]: TokenContext'):
        MMTok()(ctx)
    for name in ("tau_text", "tau_vision"):
        with pytest.raises(ValueError, match=f"{name} must be above 0, got 0"):
            MMTok(**{name: 0})
    with pytest.raises(TypeError, match="alpha must be a number, got str 'half'"):
        MMTok(alpha="half")
