"""FlowCut, layer by layer without a model: literal cases, worked out by hand next to each, and a whole encoder against
the published steps written out with Python numbers."""

import math

import pytest
import torch
from fastok.reducers import FlowCut, TokenContext
from torch import Tensor


def context(scores: Tensor, values: Tensor, layer: int = 0, n_layers: int = 1, protect: int = 1) -> TokenContext:
    ctx = TokenContext(torch.randn(*scores.shape, 4), values=values, scores={"cls": scores})
    ctx.layer, ctx.n_layers, ctx.protect = layer, n_layers, protect
    return ctx


def same_values(n: int) -> Tensor:
    """All tokens alike: the softmax is even, all norms are 2."""
    return torch.ones(1, n, 1, 2)


# ---- one layer ------------------------------------------------------------------------------------------------------


def test_the_score() -> None:
    """The class token's value is (1, 0). Products with the patches (ln 2, 1), (0, 5) and (ln 3, 0) are ln 2, 0 and
    ln 3: of the patches' softmax 2/6, 1/6 and 3/6 (the class token's own part cancels). Shares of the row (0.1, 0.1,
    0.2): 1/4, 1/4, 1/2. Norms: ln 2 + 1, 5, ln 3. (1/4 + 1/3) * 1.693 = 0.9877, (1/4 + 1/6) * 5 = 2.0833,
    (1/2 + 1/2) * 1.0986 = 1.0986. The class token's row of itself, 0.6, does not count."""
    values = torch.tensor([[1.0, 0.0], [math.log(2), 1.0], [0.0, 5.0], [math.log(3), 0.0]])[None, :, None]
    ctx = context(torch.tensor([[0.6, 0.1, 0.1, 0.2]]), values)
    assert FlowCut(2)(ctx).representative.tolist() == [[0, 2, 3]]
    torch.testing.assert_close(ctx.extra["FlowCut"], torch.tensor([[0.0, 0.987670, 2.083333, 1.098612]]))


def test_heads_are_averaged_after_the_softmax_and_before_the_norm() -> None:
    """Two heads of one channel. Head 0: 1 times 0, ln 3; head 1: 1 times ln 4, 0. Patches' softmaxes with the class
    token's (e each): e / (e + 1 + 3) is not counted, but the parts of the heads are weighted by it: 1/(4 + e),
    3/(4 + e) and 4/(5 + e), 1/(5 + e). Mean values: ln(4)/2 and ln(3)/2."""
    e = math.e
    values = torch.tensor([[1.0, 1.0], [0.0, math.log(4)], [math.log(3), 0.0]])[None, :, :, None]
    ctx = context(torch.tensor([[0.2, 0.4, 0.4]]), values)
    FlowCut(1)(ctx)
    parts = [1 / (4 + e) + 4 / (5 + e), 3 / (4 + e) + 1 / (5 + e)]
    scores = [(0.5 + parts[i] / sum(parts)) * norm / 2 for i, norm in enumerate((math.log(4), math.log(3)))]
    torch.testing.assert_close(ctx.extra["FlowCut"], torch.tensor([[0.0, *scores]]))


def test_without_a_class_token() -> None:
    """The row times the norm, 0.2 * 3, 0.5 * 1, 0.3 * 1; the semantic term would need a class token."""
    values = torch.tensor([3.0, -1.0, 1.0]).view(1, 3, 1, 1)
    ctx = context(torch.tensor([[0.2, 0.5, 0.3]]), values, protect=0)
    assert FlowCut(2)(ctx).representative.tolist() == [[0, 1]]
    torch.testing.assert_close(ctx.extra["FlowCut"], torch.tensor([[0.6, 0.5, 0.3]]))


# 8 patches, 2 wanted, 6 layers of which 4 act: with q = 3, 2, 1, 0 to go. Two equal peaks have an entropy of ln 2, a
# third of ln 8: (8 - 2) / sqrt(2) * (1 - 1/9) = 3.77, so 4 are cut. One peak: 6 / sqrt(2) = 4.24, 4. No peak: none.
# Four equal peaks have an entropy of 2/3: 6 / sqrt(2) * (1 - 4/9) = 2.36, 2.
@pytest.mark.parametrize(
    ("layer", "row", "left"),
    [
        (0, [1, 1, 0, 0, 0, 0, 0, 0], 8),
        (1, [1, 1, 0, 0, 0, 0, 0, 0], 4),
        (1, [1, 0, 0, 0, 0, 0, 0, 0], 4),
        (1, [1, 1, 1, 1, 1, 1, 1, 1], 8),
        (1, [1, 1, 1, 1, 0, 0, 0, 0], 6),
        (2, [1, 0, 0, 0, 0, 0, 0, 0], 8),
        (3, [1, 1, 1, 1, 1, 1, 1, 1], 2),
        (4, [1, 1, 0, 0, 0, 0, 0, 0], 8),  # the last two layers do not act
        (5, [1, 1, 0, 0, 0, 0, 0, 0], 8),
    ],
)
def test_how_many_are_cut(layer: int, row: list[float], left: int) -> None:
    scores = torch.tensor([[0.0, *row]])
    token_map = FlowCut(2)(context(scores, same_values(9), layer, 6))
    assert token_map.n_out == left + 1
    assert token_map.representative.tolist() == [list(range(left + 1))]  # the peaks come first, ties by index
    # A batch is cut to one length, the least of its samples'.
    both = torch.cat([scores, torch.ones(1, 9)])
    assert FlowCut(2)(context(both, same_values(9).expand(2, -1, -1, -1), layer, 6)).n_out == left + 1


def test_scores_accumulate() -> None:
    """Norms 2. Layer 0: (row + 1/4) * 2 = (1, 0.9, 0.7, 1.4); layer 1 as much of (0.9, 0.8, 1.1, 1.2), and half of each
    is (0.95, 0.85, 0.9, 1.3)."""
    first = context(torch.tensor([[0.0, 0.25, 0.2, 0.1, 0.45]]), same_values(5), 0, 4)
    assert FlowCut(2)(first).n_out == 5
    torch.testing.assert_close(first.extra["FlowCut"], torch.tensor([[0, 1, 0.9, 0.7, 1.4]]))
    second = context(torch.tensor([[0.0, 0.2, 0.15, 0.3, 0.35]]), same_values(5), 1, 4)
    second.extra["FlowCut"] = first.extra["FlowCut"]
    assert FlowCut(2)(second).representative.tolist() == [[0, 1, 4]]
    torch.testing.assert_close(second.extra["FlowCut"], torch.tensor([[0, 0.95, 0.85, 0.9, 1.3]]))


# ---- an encoder -----------------------------------------------------------------------------------------------------


def published_flowcut(rows: list[Tensor], values: list[Tensor], target: int) -> list[list[int]]:
    """The patches left after each layer, of one image; ``rows[l][1+n]`` and ``values[l][1+n,H,D]`` of all of them."""
    layers, cumulative = len(rows), None
    ids = list(range(len(rows[0]) - 1))
    history = []
    for layer in range(layers):
        q = layers - layer - 1
        if len(ids) > target:
            v = values[layer].double()[[0, *(i + 1 for i in ids)]]
            r = [float(rows[layer][i + 1]) for i in ids]
            semantic = (v[0] * v).sum(-1).softmax(0).mean(1)[1:].tolist()
            norms = v.mean(1).abs().sum(-1)[1:].tolist()
            s = [(a / sum(r) + b / sum(semantic)) * c for a, b, c in zip(r, semantic, norms, strict=True)]
            cumulative = s if cumulative is None else [0.5 * a + 0.5 * b for a, b in zip(cumulative, s, strict=True)]
            if q % 2 == 0:
                p = [a / sum(r) for a in r]
                entropy = -sum(a * math.log(a) for a in p) / math.log(len(ids))
                cut = len(ids) if q == 0 else round((len(ids) - target) / math.sqrt(q) * (1 - entropy**2))
                best = sorted(range(len(ids)), key=lambda j: (-cumulative[j], j))[: max(len(ids) - cut, target)]
                ids, cumulative = [ids[j] for j in sorted(best)], [cumulative[j] for j in sorted(best)]
        history.append(list(ids))
    return history


@pytest.mark.parametrize("keep", [20, 0.1, 64])
def test_an_encoder(keep: float) -> None:
    n, n_layers = 200, 24
    layers = range(n_layers - 2)
    rows = [(2.5 * torch.randn(1 + n)).softmax(0) for _ in layers]
    values = [torch.randn(1 + n, 2, 8) for _ in layers]
    expected = published_flowcut(rows, values, 64 if keep == 64 else 20)
    reducer, ids, carried = FlowCut(keep), torch.arange(1 + n), {}
    for layer in layers:
        assert reducer.reduces(layer, n_layers)
        ctx = context(rows[layer][ids][None], values[layer][ids][None], layer, n_layers)
        ctx.extra, ctx.n_tokens = carried, 1 + n
        token_map = reducer(ctx)
        kept = token_map.representative[0]
        ids = ids[kept]
        carried = {name: x[:, kept] for name, x in ctx.extra.items()}
        assert (ids[1:] - 1).tolist() == expected[layer]
    assert len({len(row) for row in expected}) > 4
    assert not reducer.reduces(n_layers - 2, n_layers)


def test_nan_zeros_and_errors() -> None:
    """A patch whose score is NaN goes first; probabilities of 0 count nothing towards the entropy."""
    scores = torch.tensor([[0.0, 1.0, torch.nan, 0.0, 3.0]])
    token_map = FlowCut(3)(context(scores, same_values(5)))
    assert token_map.representative.tolist() == [[0, 1, 3, 4]]
    assert FlowCut(2)(context(torch.rand(0, 9), torch.rand(0, 9, 1, 2), 1, 6)).assign.shape == (0, 9)
    with pytest.raises(ValueError, match=r"FlowCut needs values: TokenContext\(hidden=x, values=v\[B,N,G,D\]\)"):
        FlowCut(2)(TokenContext(torch.randn(1, 5, 4), scores={"cls": scores}))
    with pytest.raises(ValueError, match=r"momentum must be within \[0, 1\], got 1.1"):
        FlowCut(momentum=1.1)
    ctx = context(scores, same_values(5))
    ctx.extra["FlowCut"] = torch.rand(1, 9)
    with pytest.raises(ValueError, match=r'extra\["FlowCut"\] must be \[B,N\] for hidden \[B,N,C\], here B=1, N=5'):
        FlowCut(2)(ctx)
