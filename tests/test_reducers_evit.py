"""EViT without any model and in models, against the published method written out token by token."""

import copy
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torchvision_shim  # noqa: F401
from fastok import SoftMap, TokenMap
from fastok.integrations import apply
from fastok.reducers import EViT, TokenContext
from fastok.testing import assert_accurate, assert_same
from torch import Tensor, nn


def published_reduction(x: Tensor, attention: Tensor, keep: float, fuse: bool, protect: int) -> Tensor:
    """One sample's ``x[N,C]`` and class token's ``attention[N]``: the tokens after one reduction."""
    n = len(attention)
    count = math.ceil(keep * (n - protect)) if keep < 1 else int(keep)
    if count >= n - protect:
        return x
    ranked = sorted(range(protect, n), key=lambda j: (-attention[j].item(), j))
    rows = [x[j] for j in range(protect)] + [x[j] for j in ranked[:count]]
    if fuse:
        fused = torch.zeros_like(x[0])
        for j in sorted(ranked[count:]):
            fused = fused + attention[j] * x[j]
        rows.append(fused)
    return torch.stack(rows)


def context(batch: int = 2, n: int = 50, protect: int = 1, **more: Any) -> TokenContext:
    scores = {"cls": torch.randn(batch, n).softmax(-1)}
    return TokenContext(torch.randn(batch, n, 24), scores=scores, protect=protect, **more)


# ---- without a model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.9, 0.7, 0.5, 0.01, 1.0, 1, 20, 48, 49, 100])
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("protect", [0, 1, 2])
def test_the_published_reduction(keep: float, fuse: bool, protect: int) -> None:
    ctx = context(protect=protect)
    reduction = EViT(keep, fuse)(ctx)
    merged, _ = reduction.merge(ctx.hidden)
    share = 1000 if keep == 1.0 and isinstance(keep, float) else keep
    expected = [
        torch.stack([published_reduction(x, a, share, fuse, protect) for x, a in zip(*pair, strict=True)])
        for pair in ((ctx.hidden.double(), ctx.scores["cls"].double()), (ctx.hidden, ctx.scores["cls"]))
    ]
    count = math.ceil(share * (50 - protect)) if share < 1 else share
    assert isinstance(reduction, SoftMap) == (fuse and count < 50 - protect)
    assert_accurate(merged, *expected)
    kept = merged.shape[1] - isinstance(reduction, SoftMap)
    assert_same(merged[:, :kept], expected[1][:, :kept])  # what is kept is not touched


def test_ties_go_to_the_lowest_index_and_nan_is_never_wanted() -> None:
    scores = torch.tensor([[0.5, 0.1, torch.nan, 0.2, 0.1, 0.2, 0.1]])
    token_map = EViT(4, fuse=False)(TokenContext(torch.randn(1, 7, 4), scores={"cls": scores}, protect=1))
    assert token_map.representative.tolist() == [[0, 3, 5, 1, 4]]
    fused = EViT(4)(TokenContext(torch.randn(1, 7, 4), scores={"cls": scores}, protect=1))
    torch.testing.assert_close(fused.dense()[0, 5], torch.tensor([0, 0, 0, 0, 0, 0, 0.1]))


def test_samples_do_not_depend_on_their_batch() -> None:
    ctx = context(batch=3)
    together = EViT(0.5)(ctx).merge(ctx.hidden)[0]
    for b in range(3):
        alone = TokenContext(ctx.hidden[b : b + 1], scores={"cls": ctx.scores["cls"][b : b + 1]}, protect=1)
        torch.testing.assert_close(EViT(0.5)(alone).merge(alone.hidden)[0][0], together[b])


def test_layers() -> None:
    places = [layer for layer in range(12) if EViT().reduces(layer, 12)]
    assert places == [3, 6, 9]
    assert [layer for layer in range(24) if EViT().reduces(layer, 24)] == [6, 12, 18]
    assert [layer for layer in range(12) if EViT(layers=(0, 5)).reduces(layer, 12)] == [0, 5]
    for layer, n_out in ((2, 50), (3, 37)):
        assert EViT()(context(layer=layer, n_layers=12)).n_out == n_out
    assert EViT()(context()).n_out == 37  # called without a model


def test_gradients_flow_through_tokens_only() -> None:
    ctx = context()
    ctx.hidden.requires_grad_()
    ctx.scores["cls"].requires_grad_()
    EViT(0.5)(ctx).merge(ctx.hidden)[0].sum().backward()
    assert ctx.scores["cls"].grad is None
    assert (ctx.hidden.grad != 0).all()


def test_bad_arguments() -> None:
    for keep, kind, message in (
        (0.0, ValueError, "keep must be above 0, got 0.0"),
        (-0.5, ValueError, "keep must be above 0"),
        (0, ValueError, "keep must be at least one token, got 0"),
        (1.5, TypeError, "keep must be an int, or a fraction up to 1.0; got float 1.5"),
        ("0.7", TypeError, "keep must be an int"),
        (True, TypeError, "keep must be an int"),
    ):
        with pytest.raises(kind, match=message):
            EViT(keep)
    with pytest.raises(TypeError, match="layers must be None or a tuple"):
        EViT(layers=[3, 6])
    with pytest.raises(ValueError, match="layers must be >= 0, got -1"):
        EViT(layers=(-1,))
    hidden = torch.randn(1, 9, 8)
    with pytest.raises(ValueError, match=r'EViT needs scores\["cls"\]: TokenContext'):
        EViT()(TokenContext(hidden))
    with pytest.raises(ValueError, match=r"cls must be \[B,N\] for hidden"):
        EViT()(TokenContext(hidden, scores={"cls": torch.rand(1, 8)}))
    with pytest.raises(ValueError, match="layer must be within"):
        EViT()(TokenContext(hidden, scores={"cls": torch.rand(1, 9)}, layer=1))
    assert EViT.needs == ("cls",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        EViT().keep = 0.5


# ---- in models -------------------------------------------------------------------------------------------------------

timm_vit = pytest.importorskip("timm.models.vision_transformer")
transformers = pytest.importorskip("transformers")

N = 49
TIMM: dict[str, Any] = {"img_size": 28, "patch_size": 4, "embed_dim": 32, "num_heads": 4, "num_classes": 64}
HF: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 28,
    "patch_size": 4,
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these tensors are too small to share
    yield
    torch.set_num_threads(threads)


def randomised(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5))
    return model.eval()


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 28, 28)


def published_timm(model: Any, pixels: Tensor, reducer: EViT) -> Tensor:
    x = model.norm_pre(model._pos_embed(model.patch_embed(pixels)))
    for index, block in enumerate(model.blocks):
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        p = (q @ k.mT * 8**-0.5).softmax(-1)
        x = x + block.attn.proj((p @ v).transpose(1, 2).flatten(2))
        if index in (3, 6, 9):
            rows = p[:, :, 0].mean(1).detach()  # ours has no gradient through the scores
            x = torch.stack([published_reduction(*pair, reducer.keep, reducer.fuse, 1) for pair in zip(x, rows)])  # noqa: B905
        x = x + block.mlp(block.norm2(x))
    return model.head(model.norm(x)[:, 0])


def published_hf(model: Any, pixels: Tensor, reducer: EViT, protect: int) -> Tensor:
    x = model.embeddings(pixels)
    for index, layer in enumerate(model.layers):
        attention, y = layer.attention, layer.layernorm_before(x)
        q, k, v = (
            projection(y).unflatten(-1, (4, 8)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        p = (q @ k.mT * 8**-0.5).softmax(-1)
        x = x + attention.o_proj((p @ v).transpose(1, 2).flatten(2))
        if index in (3, 6, 9):
            rows = p[:, :, 0].mean(1)
            x = torch.stack([published_reduction(*pair, reducer.keep, reducer.fuse, protect) for pair in zip(x, rows)])  # noqa: B905
        x = x + layer.mlp(layer.layernorm_after(x))
    return model.layernorm(x)


@pytest.mark.parametrize(("reducer", "tokens"), [(EViT(), [37, 28, 21]), (EViT(0.5, fuse=False), [26, 14, 8])])
def test_timm_gives_the_published_logits(reducer: EViT, tokens: list[int]) -> None:
    model, pixels = randomised(timm_vit.VisionTransformer(**TIMM, depth=12)), images()
    with torch.no_grad():
        plain = model(pixels)
        with apply(model, reducer) as handle:
            logits = model(pixels)
            assert handle.stats.tokens == [N + 1] * 3 + [n for n in tokens for _ in range(3)]
            assert handle.token_map.n_out == tokens[-1]
        truth = published_timm(copy.deepcopy(model).double(), pixels.double(), reducer)
        assert_accurate(logits, truth, published_timm(model, pixels, reducer), factor=4)
        assert_same(model(pixels), plain)


@pytest.mark.parametrize("name", ["ViT", "DeiT"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_transformers_gives_the_published_tokens(name: str, attention: str) -> None:
    make = getattr(transformers, f"{name}Model"), getattr(transformers, f"{name}Config")
    model, pixels, protect = randomised(make[0](make[1](**HF))), images(), 1 + (name == "DeiT")
    model.set_attn_implementation(attention)
    with torch.no_grad(), apply(model, EViT()):
        tokens = model(pixels).last_hidden_state
        truth = published_hf(copy.deepcopy(model).double(), pixels.double(), EViT(), protect)
        assert_accurate(tokens, truth, published_hf(model, pixels, EViT(), protect), factor=4)


def test_training_and_gradient_checkpointing() -> None:
    model, pixels = randomised(timm_vit.VisionTransformer(**TIMM, depth=12)).train(), images()

    def gradients(target: Any, forward: Any, x: Tensor) -> Tensor:
        target.zero_grad()
        forward(x).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in target.parameters()])

    twin = copy.deepcopy(model).double()
    truth = gradients(twin, lambda x: published_timm(twin, x, EViT()), pixels.double())
    peer = gradients(model, lambda x: published_timm(model, x, EViT()), pixels)
    with apply(model, EViT()):
        plain = gradients(model, model, pixels)
        model.set_grad_checkpointing()
        recomputed = gradients(model, model, pixels)
    assert_accurate(plain, truth, peer, factor=4)
    assert_same(recomputed, plain)


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_compiles_without_graph_breaks_and_in_bfloat16(library: str) -> None:
    torch._dynamo.reset()
    reducer, pixels = EViT(layers=(0, 1)), images()
    model: Any = (
        timm_vit.VisionTransformer(**TIMM, depth=2)
        if library == "timm"
        else transformers.ViTForImageClassification(transformers.ViTConfig(**HF | {"num_hidden_layers": 2}))
    )
    randomised(model)
    with torch.no_grad(), apply(model, reducer):
        logits = [
            getattr(out, "logits", out)
            for out in (model(pixels), torch.compile(model, fullgraph=True, backend="eager")(pixels))
        ]
        assert_same(logits[1], logits[0])
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.isfinite(getattr(out := model(pixels), "logits", out)).all()
        out = model.bfloat16()(pixels.bfloat16())
        assert torch.isfinite(getattr(out, "logits", out)).all()


def test_a_model_without_a_class_token_is_refused() -> None:
    model = timm_vit.VisionTransformer(**TIMM, depth=1, class_token=False, global_pool="avg")
    with pytest.raises(ValueError, match="EViT needs a class token, of which this VisionTransformer has none"):
        apply(model, EViT())
    siglip = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**HF))
    with pytest.raises(ValueError, match="EViT needs a class token, of which SiglipVisionModel has none"):
        apply(siglip, EViT())


def test_token_map_of_a_pruned_model() -> None:
    model = randomised(timm_vit.VisionTransformer(**TIMM, depth=12))
    with torch.no_grad(), apply(model, EViT(0.5, fuse=False)) as handle:
        model(images())
        assert isinstance(handle.token_map, TokenMap)
        assert (handle.token_map.assign >= 0).sum().item() == 2 * 8
