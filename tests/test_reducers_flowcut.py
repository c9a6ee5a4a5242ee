"""FlowCut, layer by layer without a model: literal cases, worked out by hand next to each, and a whole encoder against
the published steps written out with Python numbers."""

import math

import pytest
import torch
import torchvision_shim  # noqa: F401
from fastok.integrations import apply
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


def published_step(
    row: Tensor, values: Tensor, before: list[float] | None, target: int, q: int
) -> tuple[list[int], list[float]]:
    """One image in one layer: ``row[1+n]`` and ``values[1+n,H,D]`` of what is left. The patches that stay, from 0, and
    their scores so far."""
    v, r = values.double(), row[1:].tolist()
    semantic = (v[0] * v).sum(-1).softmax(0).mean(1)[1:].tolist()
    norms = v.mean(1).abs().sum(-1)[1:].tolist()
    scores = [(a / sum(r) + b / sum(semantic)) * c for a, b, c in zip(r, semantic, norms, strict=True)]
    if before is not None:
        scores = [0.5 * a + 0.5 * b for a, b in zip(before, scores, strict=True)]
    if q % 2:
        return list(range(len(r))), scores
    entropy = -sum(a / sum(r) * math.log(a / sum(r)) for a in r) / math.log(len(r))
    cut = len(r) if q == 0 else round((len(r) - target) / math.sqrt(q) * (1 - entropy**2))
    stay = sorted(sorted(range(len(r)), key=lambda j: (-scores[j], j))[: max(len(r) - cut, target)])
    return stay, [scores[j] for j in stay]


@pytest.mark.parametrize("keep", [20, 0.1, 64])
def test_an_encoder(keep: float) -> None:
    n, n_layers, target = 200, 24, 64 if keep == 64 else 20
    rows = [(2.5 * torch.randn(1 + n)).softmax(0) for _ in range(n_layers - 2)]
    values = [torch.randn(1 + n, 2, 8) for _ in range(n_layers - 2)]
    reducer, carried, before, lengths = FlowCut(keep), {}, None, []
    ids = torch.arange(1 + n)
    for layer in range(n_layers - 2):
        assert reducer.reduces(layer, n_layers)
        ctx = context(rows[layer][ids][None], values[layer][ids][None], layer, n_layers)
        ctx.extra, ctx.n_tokens = carried, 1 + n
        kept = reducer(ctx).representative[0]
        if len(ids) - 1 > target:
            stay, before = published_step(rows[layer][ids], values[layer][ids], before, target, n_layers - 3 - layer)
            assert kept.tolist() == [0, *(j + 1 for j in stay)]
        else:
            assert len(kept) == len(ids)
        ids, carried = ids[kept], {name: x[:, kept] for name, x in ctx.extra.items()}
        lengths.append(len(ids) - 1)
    assert lengths[-1] == target
    assert len(set(lengths)) > 4
    assert not reducer.reduces(n_layers - 2, n_layers)


def test_in_clip() -> None:
    """The tokens of a CLIP encoder cut by `apply`, against its layers run by hand with their attention written out."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=8, num_attention_heads=4, intermediate_size=48, image_size=28, patch_size=4
    )
    model = transformers.CLIPVisionModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 1.5 * parameter.shape[-1] ** -0.5)
        pixels = torch.randn(1, 3, 28, 28)
        x, before, lengths = model.pre_layrnorm(model.embeddings(pixels))[0], None, []
        for index, layer in enumerate(model.encoder.layers):
            attention, y = layer.self_attn, layer.layer_norm1(x)
            q, k, v = (
                projection(y).unflatten(-1, (4, 8)).transpose(0, 1)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            p = (q @ k.mT * 8**-0.5).softmax(-1)
            x = x + attention.out_proj((p @ v).transpose(0, 1).flatten(1))
            if index < 6 and len(x) > 11:
                stay, before = published_step(p[:, 0].mean(0), v.transpose(0, 1), before, 10, 5 - index)
                x = x[[0, *(j + 1 for j in stay)]]
            x = x + layer.mlp(layer.layer_norm2(x))
            lengths.append(len(x))
        with apply(model, FlowCut(10)) as handle:
            tokens = model(pixels).last_hidden_state[0]
            assert handle.stats.tokens == lengths
    assert lengths[-1] == 11
    assert len(set(lengths)) > 2
    torch.testing.assert_close(tokens, x, rtol=1e-4, atol=1e-4)


def published_step_without_class_token(
    q: Tensor, k: Tensor, v: Tensor, before: list[float] | None, target: int, left: int
) -> tuple[list[int], list[float]]:
    """As for Qwen2-VL: the mean query's row times the norm, of ``[n,H,D]`` each."""
    row = (torch.einsum("hd,nhd->hn", q.double().mean(0), k.double()) * q.shape[-1] ** -0.5).softmax(-1).mean(0)
    r, norms = row.tolist(), v.double().mean(1).abs().sum(-1).tolist()
    scores = [a / sum(r) * b for a, b in zip(r, norms, strict=True)]
    if before is not None:
        scores = [0.5 * a + 0.5 * b for a, b in zip(before, scores, strict=True)]
    if left % 2:
        return list(range(len(r))), scores
    entropy = -sum(a / sum(r) * math.log(a / sum(r)) for a in r) / math.log(len(r))
    cut = len(r) if left == 0 else round((len(r) - target) / math.sqrt(left) * (1 - entropy**2))
    stay = sorted(sorted(range(len(r)), key=lambda j: (-scores[j], j))[: max(len(r) - cut, target)])
    return stay, [scores[j] for j in stay]


def test_in_siglip() -> None:
    """Without a class token: `apply` against the layers run by hand, their attention written out."""
    transformers = pytest.importorskip("transformers")
    config = transformers.SiglipVisionConfig(
        hidden_size=32, num_hidden_layers=8, num_attention_heads=4, intermediate_size=48, image_size=28, patch_size=4,
        vision_use_head=False,
    )  # fmt: skip
    model = transformers.SiglipVisionModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 1.5 * parameter.shape[-1] ** -0.5)
        pixels = torch.randn(1, 3, 28, 28)
        x, before, lengths = model.embeddings(pixels)[0], None, []
        for index, layer in enumerate(model.encoder.layers):
            attention, y = layer.self_attn, layer.layer_norm1(x)
            q, k, v = (f(y).unflatten(-1, (4, 8)) for f in (attention.q_proj, attention.k_proj, attention.v_proj))
            p = (torch.einsum("qhd,khd->hqk", q, k) * 8**-0.5).softmax(-1)
            x = x + attention.out_proj(torch.einsum("hqk,khd->qhd", p, v).flatten(1))
            if index < 6 and len(x) > 10:
                stay, before = published_step_without_class_token(q, k, v, before, 10, 5 - index)
                x = x[stay]
            x = x + layer.mlp(layer.layer_norm2(x))
            lengths.append(len(x))
        with apply(model, FlowCut(10)) as handle:
            tokens = model(pixels).last_hidden_state[0]
            assert handle.stats.tokens == lengths
    assert lengths[-1] == 10
    torch.testing.assert_close(tokens, model.post_layernorm(x), rtol=1e-4, atol=1e-4)


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
