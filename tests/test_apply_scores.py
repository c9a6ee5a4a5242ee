"""How reducers reach a model's attention: proportional attention in our kernel, and the scores it gives on the side."""

from collections.abc import Iterator
from typing import Any

import fastok
import pytest
import torch
import torchvision_shim  # noqa: F401
from fastok.integrations import apply
from fastok.reducers import TokenContext, ToMe
from fastok.token_map import TokenMap
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

timm_vit = pytest.importorskip("timm.models.vision_transformer")
timm_eva = pytest.importorskip("timm.models.eva")
transformers = pytest.importorskip("transformers")

TIMM: dict[str, Any] = {"img_size": 28, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 8}
HF: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 28,
    "patch_size": 4,
}
MODELS: dict[str, Any] = {
    "timm ViT": lambda: timm_vit.VisionTransformer(**TIMM, qk_norm=True),
    "timm Eva": lambda: timm_eva.Eva(**TIMM, use_rot_pos_emb=True),
    "ViT": lambda: transformers.ViTModel(transformers.ViTConfig(**HF)),
    "DeiT": lambda: transformers.DeiTModel(transformers.DeiTConfig(**HF)),
    "DINOv2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**HF)),
    "CLIP": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**HF)),
}
over_models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


class Ops(TorchDispatchMode):
    """Counts calls of operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _one_thread_without_gradients() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these tensors are too small to share
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def build(make: Any) -> nn.Module:
    model = make().eval()
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * (parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5))
    return model


def images() -> Tensor:
    return torch.randn(2, 3, 28, 28)


@over_models
def test_proportional_attention_is_ours_where_there_are_sizes(make: Any) -> None:
    model = build(make)
    for reducer, expected in ((ToMe(6), 2), (ToMe([0, 6]), 1), (ToMe(6, prop_attn=False), 0)):
        with apply(model, reducer), Ops() as ops:
            model(images())
        assert ops.calls.get("fastok::attention", 0) == expected
    with Ops() as ops:
        model(images())
    assert "fastok::attention" not in ops.calls


@pytest.mark.parametrize("name", ["timm ViT", "ViT"])
def test_an_attention_that_writes_out_its_matrix_still_does(name: str) -> None:
    model = build(MODELS[name])
    if name == "ViT":
        model.set_attn_implementation("eager")
    else:
        for block in model.blocks:
            block.attn.fused_attn = False
    with apply(model, ToMe(6)), Ops() as ops:
        model(images())
    assert "fastok::attention" not in ops.calls
    if name == "ViT":
        with apply(model, ToMe(6)):
            attentions = model(images(), output_attentions=True).attentions
        assert [a.shape[-1] for a in attentions] == [50, 44, 38]


@pytest.mark.parametrize("name", ["timm ViT", "ViT"])
def test_dropout_takes_the_models_own_attention(name: str) -> None:
    model = build(MODELS[name]).train()
    for module in model.modules():
        if isinstance(getattr(module, "attn_drop", None), nn.Dropout):
            module.attn_drop.p = 0.1
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    with apply(model, ToMe(6)), Ops() as ops:
        model(images())
    assert "fastok::attention" not in ops.calls


def test_transformers_models_with_our_attention_record_scores() -> None:
    fastok.register_transformers()
    model, pixels = build(MODELS["ViT"]), images()
    with apply(model, ToMe(6)):
        expected = model(pixels).last_hidden_state
        model.set_attn_implementation("fastok")
        with fastok.record_scores(fastok.ScoreSpec(rows=0)) as recorded:
            torch.testing.assert_close(model(pixels).last_hidden_state, expected)
    assert [layer[0].shape[1] for layer in recorded] == [50, 44, 38]


class Watch:
    """A reducer that notes the scores it is shown, and drops the last token."""

    needs = ("cls",)

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, ctx: TokenContext) -> TokenMap:
        self.seen.append(ctx.scores["cls"])
        n = ctx.hidden.shape[1]
        return TokenMap.keep(torch.arange(n - 1).expand(len(ctx.hidden), -1), n)


@over_models
@pytest.mark.parametrize("prop_attn", [False, True])
def test_scores_are_the_class_tokens_row_of_attention(make: Any, prop_attn: bool) -> None:
    model, watch, rows = build(make), Watch(), []
    watch.prop_attn = prop_attn
    if isinstance(model, transformers.PreTrainedModel):
        model.set_attn_implementation("eager")
        with apply(model, watch):
            attentions = model(images(), output_attentions=True).attentions
        rows = [a[:, :, 0].mean(1) for a in attentions]
    else:
        plain = torch.nn.functional.scaled_dot_product_attention

        def spy(q: Tensor, k: Tensor, v: Tensor, mask: Any = None, *args: Any, **kwargs: Any) -> Tensor:
            rows.append((q[:, :, 0:1] @ k.mT * q.shape[-1] ** -0.5).softmax(-1)[:, :, 0].mean(1))
            return plain(q, k, v, mask, *args, **kwargs)

        torch.nn.functional.scaled_dot_product_attention = spy
        try:
            with apply(model, watch):
                model(images())
        finally:
            torch.nn.functional.scaled_dot_product_attention = plain
    assert [s.shape[1] for s in watch.seen] == [n for n in (rows[0].shape[1],) for n in (n, n - 1, n - 2)]
    for seen, row in zip(watch.seen, rows, strict=False):
        torch.testing.assert_close(seen, row)


def test_scores_of_an_unfused_timm_model() -> None:
    model, pixels, watch = build(MODELS["timm ViT"]), images(), Watch()
    with apply(model, watch):
        expected = model(pixels)
    for block in model.blocks:
        block.attn.fused_attn = False
    before = [dict(vars(block.attn)) for block in model.blocks]
    with apply(model, watch):
        torch.testing.assert_close(model(pixels), expected)
    assert [dict(vars(block.attn)) for block in model.blocks] == before
    assert not model.blocks[0].attn.fused_attn
    torch.testing.assert_close(watch.seen[3:], watch.seen[:3])


def test_a_model_without_a_class_token_has_none_of_its_scores() -> None:
    for make in (
        lambda: timm_vit.VisionTransformer(**TIMM, class_token=False, global_pool="avg"),
        lambda: timm_vit.VisionTransformer(**TIMM, class_token=False, reg_tokens=2, global_pool="avg"),
        lambda: timm_eva.Eva(**TIMM, class_token=False),
        lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**HF)),
    ):
        model = build(make)
        with pytest.raises(ValueError, match="Watch needs a class token, of which"):
            apply(model, Watch())
        assert all("_fastok" not in vars(module) for module in model.modules())


class Last:
    """A method that acts behind an encoder, and notes what it is shown; or wherever ``layers`` says."""

    def __init__(
        self, needs: tuple[str, ...], layers: tuple[int, ...] | None = None, **listed: tuple[int, ...]
    ) -> None:
        self.needs, self.layers, self.listed = needs, layers, listed
        self.seen: list[TokenContext] = []

    def reduces(self, layer: int, n_layers: int) -> bool:
        return layer == n_layers - 1 if self.layers is None else layer in self.layers

    def score_layers(self, n_layers: int) -> dict[str, tuple[int, ...]]:
        return {name.replace("_", ":"): layers for name, layers in self.listed.items()}

    def __call__(self, ctx: TokenContext) -> TokenMap:
        self.seen.append(ctx)
        kept = torch.cat([torch.arange(ctx.protect), torch.arange(ctx.protect, ctx.hidden.shape[1], 2)])
        shown = ctx.extra.get("Last")
        place = torch.arange(ctx.hidden.shape[1], dtype=torch.float32).repeat(len(ctx.hidden), 1)
        ctx.extra["Last"] = place if shown is None else shown + 100
        return TokenMap.keep(kept.repeat(len(ctx.hidden), 1), ctx.hidden.shape[1])


@pytest.mark.parametrize("name", ["timm ViT", "ViT", "CLIP"])
def test_a_method_behind_an_encoder_sees_all_that_its_layers_have(name: str) -> None:
    model = build(MODELS[name])
    needs = ("cls", "column", "column:early", "cls:logit", "keys", "values", "vision", "vision_cls", "valid", "crops")
    reducer, pixels = Last(needs, column_early=(0, -2)), images()
    probabilities, logits, values = [], [], []

    def spy(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        logits.append(q @ k.mT * q.shape[-1] ** -0.5)
        probabilities.append(logits[-1].softmax(-1))
        values.append(v.transpose(1, 2))
        return plain(q, k, v, *args, **kwargs)

    plain, torch.nn.functional.scaled_dot_product_attention = torch.nn.functional.scaled_dot_product_attention, spy
    try:
        model(pixels)
    finally:
        torch.nn.functional.scaled_dot_product_attention = plain
    with apply(model, reducer) as handle:
        out = model(pixels)
    (ctx,) = reducer.seen
    torch.testing.assert_close(ctx.scores["cls"], probabilities[2].mean(1)[:, 0])
    torch.testing.assert_close(ctx.scores["column"], probabilities[2].mean((1, 2)))
    torch.testing.assert_close(
        ctx.scores["column:early"], probabilities[0].mean((1, 2)) + probabilities[1].mean((1, 2))
    )
    torch.testing.assert_close(ctx.scores["cls:logit"], logits[2].mean(1)[:, 0])
    torch.testing.assert_close(ctx.values, values[2])
    assert ctx.keys.shape == ctx.values.shape
    assert torch.equal(ctx.extra["vision"], ctx.hidden)
    assert torch.equal(ctx.extra["vision_cls"], ctx.hidden[:, 0])
    assert (ctx.protect, ctx.layer, ctx.n_layers, ctx.n_tokens) == (1, 2, 3, 50)
    assert handle.stats.tokens == [50, 50, 26]
    if name != "timm ViT":
        assert out.last_hidden_state.shape[1] == 26


def test_what_a_method_accumulates_goes_with_the_tokens() -> None:
    model, reducer = build(MODELS["CLIP"]), Last(("column",), (0, 2), column=(0, 1))
    with apply(model, reducer):
        model(images())
        model(images())
    for first, second in (reducer.seen[:2], reducer.seen[2:]):
        kept = torch.tensor([0, *range(1, 50, 2)])
        assert torch.equal(second.extra["Last"][0], kept + 100.0)
        assert second.n_tokens == 50
        assert second.scores["column"].shape == (len(images()), 26)
        assert bool((second.scores["column"] > first.scores["column"][:, kept]).all())  # a layer more


def test_grids_and_encoders_without_a_class_token() -> None:
    siglip = build(lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**HF)))
    reducer = Last(("cls", "column", "grid"))
    with apply(siglip, reducer):
        siglip(images())
        siglip(torch.randn(1, 3, 16, 36), interpolate_pos_encoding=True)
    assert torch.equal(reducer.seen[0].scores["cls"], reducer.seen[0].scores["column"])
    assert [ctx.grid for ctx in reducer.seen] == [(1, 7, 7), (1, 4, 9)]
    with pytest.raises(ValueError, match="Last needs a class token, of which SiglipVisionModel has none"):
        apply(siglip, Last(("vision_cls",)))
    with pytest.raises(NotImplementedError, match=r"required, grid; supported, .*; missing, grid"):
        apply(build(MODELS["timm ViT"]), Last(("grid",)))
    with pytest.raises(ValueError, match=r"score_layers: column of layers \(3,\), of which there are 3"):
        apply(siglip, Last(("column",), column=(3,)))
