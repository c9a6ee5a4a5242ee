"""fastok.integrations.apply on transformers' vision models, against the published method on their submodules."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchvision_shim  # noqa: F401
from fastok import TokenMap
from fastok.integrations import apply
from fastok.reducers import TokenContext, ToMe
from fastok.reducers.tome import schedule
from fastok.testing import assert_accurate, assert_same
from test_reducers_tome import published_groups, published_merge
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

N = 49
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 28,
    "patch_size": 4,
}
TEXT = VISION | {"num_hidden_layers": 1, "vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
R = 6


def mean(tokens: Tensor, size: Tensor) -> Tensor:
    return (tokens * size[..., None]).sum(1) / N


def two_heads(model: Any, x: Tensor, size: Tensor, prop_attn: bool) -> Tensor:
    x = model.deit.layernorm(x)
    return (model.cls_classifier(x[:, 0]) + model.distillation_classifier(x[:, 1])) / 2


def class_and_mean(encoder: str, protect: int) -> Callable[..., Tensor]:
    def head(model: Any, x: Tensor, size: Tensor, prop_attn: bool) -> Tensor:
        x = getattr(model, encoder).layernorm(x)
        return model.classifier(torch.cat([x[:, 0], mean(x[:, protect:], size[:, protect:])], 1))

    return head


def attention_pooling(model: Any, x: Tensor, size: Tensor, prop_attn: bool) -> Tensor:
    head, x = model.head, model.post_layernorm(x)
    q, k, v = (
        nn.functional.linear(y, weight, bias).unflatten(-1, (4, 8)).transpose(1, 2)
        for y, weight, bias in zip(
            (head.probe.expand(len(x), -1, -1), x, x),
            head.attention.in_proj_weight.chunk(3),
            head.attention.in_proj_bias.chunk(3),
            strict=True,
        )
    )
    logits = q @ k.mT * 8**-0.5 + (size.log()[:, None, None] if prop_attn else 0)
    y = head.attention.out_proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))[:, 0]
    return y + head.mlp(head.layernorm(y))


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    encoder: str
    protect: int
    head: Callable[..., Tensor]
    result: str = "logits"


def clip_config() -> Any:
    return transformers.CLIPConfig(vision_config=VISION, text_config=TEXT, num_labels=64)


def siglip_config() -> Any:
    return transformers.SiglipConfig(vision_config=VISION, text_config=TEXT, num_labels=64)


CASES = {
    "ViT": Case(
        lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**VISION, num_labels=64)),
        "vit",
        1,
        lambda model, x, size, prop: model.classifier(model.vit.layernorm(x)[:, 0]),
    ),
    "DeiT": Case(
        lambda: transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**VISION, num_labels=64)),
        "deit",
        2,
        two_heads,
    ),
    "DINOv2": Case(
        lambda: transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**VISION, num_labels=64)),
        "dinov2",
        1,
        class_and_mean("dinov2", 1),
    ),
    "DINOv2 with registers": Case(
        lambda: transformers.Dinov2WithRegistersForImageClassification(
            transformers.Dinov2WithRegistersConfig(**VISION, num_register_tokens=3, num_labels=64)
        ),
        "dinov2_with_registers",
        4,
        class_and_mean("dinov2_with_registers", 4),
    ),
    "CLIP, projection": Case(
        lambda: transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION)),
        "vision_model",
        1,
        lambda model, x, size, prop: model.visual_projection(model.vision_model.post_layernorm(x[:, 0])),
        "image_embeds",
    ),
    "CLIP, classifier": Case(
        lambda: transformers.CLIPForImageClassification(clip_config()),
        "vision_model",
        1,
        lambda model, x, size, prop: model.classifier(mean(x[:, 1:], size[:, 1:])),
    ),
    "SigLIP, attention pooling": Case(
        lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION)),
        "",
        0,
        attention_pooling,
        "pooler_output",
    ),
    "SigLIP, classifier": Case(
        lambda: transformers.SiglipForImageClassification(siglip_config()),
        "vision_model",
        0,
        lambda model, x, size, prop: model.classifier(mean(model.vision_model.post_layernorm(x), size)),
    ),
}
over_models = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def build(case: Case, attention: str = "sdpa") -> nn.Module:
    """The model with weights large enough that tokens differ."""
    model = case.make()
    model.get_submodule(case.encoder).set_attn_implementation(attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5))
    return model.eval()


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 28, 28)


@pytest.fixture(autouse=True)
def _one_thread_without_gradients() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these tensors are too small to share
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def published(case: Case, model: nn.Module, pixels: Tensor, reducer: ToMe) -> Tensor:
    """The published method as a slow forward with loops over groups, sharing no code with fastok."""
    encoder: Any = model.get_submodule(case.encoder)
    x = getattr(encoder, "pre_layrnorm", nn.Identity())(encoder.embeddings(pixels))
    size = torch.ones(x.shape[:2], dtype=x.dtype)
    inner = getattr(encoder, "encoder", encoder)
    layers = inner.layer if hasattr(inner, "layer") else inner.layers
    merged = False
    for layer, r in zip(layers, schedule(reducer.r, len(layers)), strict=True):
        first, attention, second = (
            next(getattr(layer, name) for name in names if hasattr(layer, name))
            for names in (
                ("layernorm_before", "norm1", "layer_norm1"),
                ("attention", "self_attn"),
                ("layernorm_after", "norm2", "layer_norm2"),
            )
        )
        y = first(x)
        q, k, v = (
            projection(y).unflatten(-1, (4, 8)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        logits = q @ k.mT * 8**-0.5
        if merged and reducer.prop_attn:
            logits = logits + size.log()[:, None, None]
        y = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        y = attention.o_proj(y) if hasattr(attention, "o_proj") else attention.out_proj(y)
        x = x + getattr(layer, "layer_scale1", nn.Identity())(y)
        if r > 0:
            merged = True
            x, size = published_merge(x, size, [published_groups(metric, r, case.protect) for metric in k.mean(1)])
        x = x + getattr(layer, "layer_scale2", nn.Identity())(layer.mlp(second(x)))
    return case.head(model, x, size, reducer.prop_attn)


@over_models
@pytest.mark.parametrize(("prop_attn", "attention"), [(True, "sdpa"), (True, "eager"), (False, "sdpa")])
def test_results_are_the_published_ones(case: Case, prop_attn: bool, attention: str) -> None:
    model, pixels, reducer = build(case, attention), images(), ToMe([R, 0, 2 * R], prop_attn)
    with apply(model, reducer) as handle:
        result = getattr(model(pixels), case.result)
        n = N + case.protect
        assert handle.stats.tokens == [n - R, n - R, n - 3 * R]
    truth = published(case, copy.deepcopy(model).double(), pixels.double(), reducer)
    assert_accurate(result, truth, published(case, model, pixels, reducer), factor=4)


@over_models
def test_special_tokens_are_protected_and_every_patch_is_kept(case: Case) -> None:
    model = build(case)
    with apply(model, ToMe(1000)) as handle:
        model(images(1))
        token_map = handle.token_map
    assert token_map.keep_mask.all()
    assert token_map.n_out < case.protect + N // 4
    assert (token_map.assign[:, : case.protect] == torch.arange(case.protect)).all()
    assert (token_map.assign[:, case.protect :] >= case.protect).all()


class Grids:
    """Keeps everything, and remembers the grids that it was shown."""

    needs = ("grid",)

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, ctx: TokenContext) -> TokenMap:
        self.seen.append(ctx.grid)
        return TokenMap.identity(*ctx.hidden.shape[:2], ctx.hidden.device)


@over_models
def test_reducers_are_shown_the_grid(case: Case) -> None:
    model, reducer = build(case), Grids()
    with apply(model, reducer):
        model(images())
        model(images()[:, :, 8:], interpolate_pos_encoding=True)
    assert reducer.seen == [(1, 7, 7)] * 3 + [(1, 5, 7)] * 3


@over_models
def test_removal_restores_everything(case: Case) -> None:
    model, pixels = build(case), images()
    plain = getattr(model(pixels), case.result)
    before = [(type(m), {k: v for k, v in vars(m).items() if k != "_parameters"}) for m in model.modules()]
    with apply(model, ToMe(0)):
        assert_same(getattr(model(pixels), case.result), plain)
    with apply(model, ToMe(R)):
        assert not torch.equal(getattr(model(pixels), case.result), plain)
        with pytest.raises(ValueError, match="applied to this model already"):
            apply(model, ToMe(R))
    with pytest.raises(KeyError, match="from the body"), apply(model, ToMe(R)):
        raise KeyError("from the body")
    after = [(type(m), {k: v for k, v in vars(m).items() if k != "_parameters"}) for m in model.modules()]
    assert after == before
    assert_same(getattr(model(pixels), case.result), plain)


@over_models
def test_bfloat16(case: Case) -> None:
    model, pixels = build(case).bfloat16(), images().bfloat16()
    with apply(model, ToMe(R)) as handle:
        result = getattr(model(pixels), case.result)
        assert handle.stats.tokens[-1] == N + case.protect - 3 * R
    assert result.dtype == torch.bfloat16
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("name", ["ViT", "DINOv2", "SigLIP, attention pooling"])
def test_training_and_gradient_checkpointing(name: str) -> None:
    case = CASES[name]
    model, pixels = build(case).train(), images()

    def gradients(target: nn.Module, forward: Callable[[], Tensor]) -> Tensor:
        target.zero_grad()
        with torch.enable_grad():
            forward().square().sum().backward()
        return torch.cat([p.grad.flatten() for p in target.parameters() if p.grad is not None])

    reducer = ToMe(R)
    peer = gradients(model, lambda: published(case, model, pixels, reducer))
    twin = copy.deepcopy(model).double()
    truth = gradients(twin, lambda: published(case, twin, pixels.double(), reducer))
    with apply(model, reducer) as handle:
        plain = gradients(model, lambda: getattr(model(pixels), case.result))
        model.activation_checkpointing_enable()
        recomputed = gradients(model, lambda: getattr(model(pixels), case.result))
        assert handle.stats.tokens == [N + case.protect - R * i for i in (1, 2, 3)]
    assert_accurate(plain, truth, peer, factor=4)
    assert_same(recomputed, plain)


@pytest.mark.parametrize("name", ["ViT", "DINOv2", "SigLIP, attention pooling"])
def test_compiles_without_graph_breaks(name: str) -> None:
    torch._dynamo.reset()
    model, pixels = build(CASES[name]), images()
    with apply(model, ToMe(R)) as handle:
        expected = getattr(model(pixels), CASES[name].result)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert_same(getattr(compiled(pixels), CASES[name].result), expected)
        assert handle.stats.tokens == []


def test_finds_the_vision_tower_of_a_two_tower_model() -> None:
    for model in (transformers.CLIPModel(clip_config()), transformers.SiglipModel(siglip_config())):
        with apply(model.eval(), ToMe(R)) as handle:
            out = model(input_ids=torch.tensor([[0, 5, 1]]), pixel_values=images(), output_hidden_states=True)
            assert handle.stats.tokens[-1] in (N - 3 * R, N + 1 - 3 * R)
        assert out.logits_per_image.shape == (2, 1)
        assert [h.shape[1] for h in out.vision_model_output.hidden_states][1:] == handle.stats.tokens


def test_unsupported_calls_are_refused() -> None:
    config = transformers.ViTConfig(**VISION)
    masked = transformers.ViTForMaskedImageModeling(config)
    with pytest.raises(TypeError, match="decodes the full grid"):
        apply(masked, ToMe(R))
    assert all("_fastok" not in vars(module) for module in masked.modules())
    with pytest.raises(TypeError, match=r"supported are timm.*transformers: ViTModel, DeiTModel.*SiglipVisionModel"):
        apply(transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)), ToMe(R))
    model = transformers.ViTModel(transformers.ViTConfig(**VISION, attention_probs_dropout_prob=0.1))
    with apply(model, ToMe(R)):
        with pytest.raises(NotImplementedError, match="attention mask"):
            model(images(), attention_mask=torch.tensor([[1] * N + [0]] * 2))
        model.config._attn_implementation = "flash_attention_2"
        with pytest.raises(NotImplementedError, match=r"supported, 'sdpa' and 'eager'.*got 'flash_attention_2'"):
            model(images())
