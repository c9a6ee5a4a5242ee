"""fastok.integrations.apply on timm models, against the published method written on the models' own submodules."""

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
import torchvision_shim  # noqa: F401
from fastok import SoftMap, TokenMap
from fastok.integrations import apply
from fastok.reducers import TokenContext, ToMe
from fastok.reducers.tome import schedule
from fastok.testing import assert_accurate, assert_same
from test_reducers_tome import published_groups, published_merge
from timm_cases import SMALL, N, eva, images, randomised, timm_vit, vit
from timm_cases import one_thread_without_gradients as one_thread_without_gradients
from torch import Tensor, nn

timm_deit = pytest.importorskip("timm.models.deit")


def published(model: Any, pixels: Tensor, reducer: ToMe) -> Tensor:
    """Logits of the published method: a slow ViT forward with loops over groups, sharing no code with fastok."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(pixels)))
    size = torch.ones(x.shape[:2], dtype=x.dtype)
    protect = model.num_prefix_tokens
    merged = False
    for block, r in zip(model.blocks, schedule(reducer.r, len(model.blocks)), strict=False):
        attn = block.attn
        post = isinstance(block, timm_vit.ResPostBlock)
        y = x if post else block.norm1(x)
        q, k, v = attn.qkv(y).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = attn.q_norm(q), attn.k_norm(k)
        logits = q @ k.mT * attn.head_dim**-0.5
        if merged and reducer.prop_attn:
            logits = logits + size.log()[:, None, None]
        y = attn.proj(attn.norm((logits.softmax(-1) @ v).transpose(1, 2).flatten(2)))
        x = x + (block.norm1(y) if post else block.ls1(y))
        if r > 0:
            merged = True
            x, size = published_merge(x, size, [published_groups(metric, r, protect) for metric in k.mean(1)])
        x = x + (block.norm2(block.mlp(x)) if post else block.ls2(block.mlp(block.norm2(x))))
    x = model.norm(x)
    if hasattr(model, "head_dist"):
        return (model.head(x[:, 0]) + model.head_dist(x[:, 1])) / 2
    if model.global_pool == "token":
        x = x[:, 0]
    elif model.global_pool == "map":
        pool, patches = model.attn_pool, x[:, protect:]
        q = pool.q(pool.latent).unflatten(-1, (4, 8)).transpose(1, 2)
        k, v = pool.kv(patches).unflatten(-1, (2, 4, 8)).permute(2, 0, 3, 1, 4)
        logits = q @ k.mT * 8**-0.5 + (size[:, protect:].log()[:, None, None] if reducer.prop_attn else 0)
        x = pool.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = (x + pool.mlp(pool.norm(x)))[:, 0]
    else:
        patches, counts = x[:, protect:], size[:, protect:, None]
        mean = (patches * counts).sum(1) / N
        x = mean if model.global_pool == "avg" else (mean + patches.amax(1)) / 2
    return model.head(model.fc_norm(x))


MODELS = {
    "class token": {},
    "registers": {"reg_tokens": 3},
    "no class token, average": {"class_token": False, "global_pool": "avg"},
    "class token, average": {"global_pool": "avg"},
    "average and maximum": {"global_pool": "avgmax"},
    "attention pooling": {"global_pool": "map"},
    "layer scale, qk-norm, pre-norm": {"init_values": 0.3, "qk_norm": True, "pre_norm": True},
    "post-norm": {"block_fn": timm_vit.ResPostBlock},
}


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("prop_attn", [True, False])
def test_logits_are_the_published_ones(options: dict[str, Any], prop_attn: bool) -> None:
    model, pixels, reducer = vit(**options), images(), ToMe(6, prop_attn)
    with apply(model, reducer):
        logits = model(pixels)
    truth = published(copy.deepcopy(model).double(), pixels.double(), reducer)
    assert_accurate(logits, truth, published(model, pixels, reducer), factor=4)
    assert (logits - model(pixels)).abs().max() > 1e-3  # merging does something


@pytest.mark.parametrize(
    ("r", "fused"),
    [(3, False), ([10, 0, 5], True), ([0, 0, 20], True), ((6, -1.0), True), ((6, 1.0), False), (1000, True)],
)
def test_schedules_give_the_published_logits(r: Any, fused: bool) -> None:
    model, pixels, reducer = vit(), images(3), ToMe(r)
    for block in model.blocks:
        block.attn.fused_attn = fused
    with apply(model, reducer) as handle:
        logits = model(pixels)
        left = [N + 1]
        for rate in schedule(r, 4)[:4]:
            left.append(left[-1] - min(rate, (left[-1] - 1) // 2))
        assert handle.stats.tokens == left[1:]
    truth = published(copy.deepcopy(model).double(), pixels.double(), reducer)
    assert_accurate(logits, truth, published(model, pixels, reducer), factor=4)


def test_distilled_model_protects_both_tokens() -> None:
    model, pixels = randomised(timm_deit.VisionTransformerDistilled(**SMALL)), images()
    with apply(model, ToMe(6)) as handle:
        logits = model(pixels)
        assert (handle.token_map.assign[:, :2] == torch.arange(2)).all()
        assert (handle.token_map.assign[:, 2:] >= 2).all()
    truth = published(copy.deepcopy(model).double(), pixels.double(), ToMe(6))
    assert_accurate(logits, truth, published(model, pixels, ToMe(6)), factor=4)


# ---- what the handle tells ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_token_map_says_which_tokens_became_which(batch: int) -> None:
    model, pixels = vit(reg_tokens=2), images(batch)
    with apply(model, ToMe(8)) as handle:
        with pytest.raises(RuntimeError, match="no forward"):
            _ = handle.token_map
        assert handle.stats.tokens == []
        model(pixels)
        token_map, stats = handle.token_map, handle.stats
    assert stats.tokens == [44, 36, 28, 20]
    assert stats.seconds > 0
    assert isinstance(token_map, TokenMap)
    assert (token_map.n_in, token_map.n_out, token_map.batch_size) == (52, 20, batch)
    assert token_map.keep_mask.all()  # every patch is part of some output token
    assert (token_map.assign[:, :3] == torch.arange(3)).all()
    sizes = token_map.merge(torch.ones(batch, 52, 1))[1]
    assert_same(model.num_prefix_tokens + sizes[:, 3:].sum(1), torch.full((batch,), 52.0))
    assert_same(handle.token_map.assign, token_map.assign)  # still there after removal


def test_only_the_last_forward_is_remembered() -> None:
    model = vit()
    with apply(model, ToMe([8])) as handle:
        model(images(3))
        model.forward_intermediates(images(1), stop_early=True, output_fmt="NLC", indices=[1])
        assert handle.stats.tokens == [42, 42]
        assert handle.token_map.batch_size == 1


def test_merging_identical_tokens_changes_nothing() -> None:
    """With all patches alike, sizes make attention and average pooling see what they saw before."""
    for options in ({"global_pool": "avg"}, {"global_pool": "map"}, {}):
        model = vit(pos_embed="none", **options)
        pixels = torch.randn(2, 3, 1, 1).expand(2, 3, 28, 28)
        plain = model(pixels)
        with apply(model, ToMe(1000)) as handle:
            merged = model(pixels)
            assert handle.stats.tokens[-1] <= 5
        assert_accurate(merged, copy.deepcopy(model).double()(pixels.double()), plain, factor=8)


# ---- leaving no trace -----------------------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> list[Any]:
    """Class and attributes of every module: what objects they are, and for dictionaries what is in them."""
    return [
        (name, type(module), [(k, id(v), list(v.items()) if isinstance(v, dict) else None) for k, v in attributes])
        for name, module in model.named_modules()
        for attributes in [[item for item in vars(module).items() if item[0] != "_parameters"]]
    ]


@pytest.mark.parametrize("make", [vit, lambda: eva(global_pool="map", use_rot_pos_emb=True)], ids=["vit", "eva"])
def test_removal_restores_everything(make: Any) -> None:
    model, pixels = make(), images()
    before, plain, state = snapshot(model), model(pixels), copy.deepcopy(model.state_dict())
    with apply(model, ToMe(8)) as handle:
        assert type(model).__name__ in ("VisionTransformer", "Eva")
        assert list(model.state_dict()) == list(state)
        assert not torch.equal(model(pixels), plain)
    assert snapshot(model) == before
    assert_same(model(pixels), plain)
    for key, value in model.state_dict().items():
        assert_same(value, state[key], key)
    handle.remove()
    with pytest.raises(KeyError, match="from the body"), apply(model, ToMe(8)):
        raise KeyError("from the body")
    assert snapshot(model) == before
    with apply(model, ToMe(8)), pytest.raises(RuntimeError):
        model(torch.randn(1, 5, 28, 28))
    assert_same(model(pixels), plain)


def test_r_zero_is_the_model_itself() -> None:
    for options in ({}, {"global_pool": "avg"}, {"global_pool": "map"}):
        model, pixels = vit(**options), images()
        plain = model(pixels)
        with apply(model, ToMe(0)) as handle:
            assert_same(model(pixels), plain)
            assert handle.stats.tokens == [N + 1] * 4
            assert handle.token_map.n_out == N + 1


def test_applying_twice_is_an_error_and_harmless() -> None:
    model, pixels = vit(), images()
    with apply(model, ToMe(8)):
        merged = model(pixels)
        with pytest.raises(ValueError, match="applied to this model already"):
            apply(model, ToMe(4))
        assert_same(model(pixels), merged)
    with apply(model, ToMe(8)):
        assert_same(model(pixels), merged)


def test_copies_stand_alone() -> None:
    model, pixels = vit(), images()
    with apply(model, ToMe(8)):
        merged = model(pixels)
        twin = copy.deepcopy(model)
    assert_same(twin(pixels), merged)


# ---- training, precision, compilation -------------------------------------------------------------------------------


def gradients(model: nn.Module, forward: Any, pixels: Tensor) -> Tensor:
    model.zero_grad()
    with torch.enable_grad():
        forward(pixels).square().sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def test_training_and_gradient_checkpointing() -> None:
    model, pixels, reducer = vit(init_values=0.5).train(), images(), ToMe(6)
    peer = gradients(model, lambda x: published(model, x, reducer), pixels)
    twin = copy.deepcopy(model).double()
    truth = gradients(twin, lambda x: published(twin, x, reducer), pixels.double())
    with apply(model, reducer) as handle:
        plain = gradients(model, model, pixels)
        model.set_grad_checkpointing()
        recomputed = gradients(model, model, pixels)
        assert handle.stats.tokens == [44, 38, 32, 26]
        assert model._fastok.sizes[-1].grad_fn is None  # the graph is not kept alive
    assert_accurate(plain, truth, peer, factor=4)
    assert_same(recomputed, plain)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_of_several_blocks(reentrant: bool) -> None:
    model, tokens = vit().train(), torch.randn(2, N + 1, 32)

    def halves(x: Tensor) -> Tensor:
        for half in (model.blocks[:2], model.blocks[2:]):
            x = torch.utils.checkpoint.checkpoint(half, x, use_reentrant=reentrant)
        return x

    results = []
    with apply(model, ToMe(6)), torch.enable_grad():
        for forward in (model.blocks, halves):
            x = tokens.clone().requires_grad_()
            forward(x).square().sum().backward()
            results.append(x.grad)
    assert_same(results[1], results[0])


def test_checkpoints_of_an_earlier_forward_are_an_error() -> None:
    """Recomputing a layer with another forward's sizes would give wrong gradients without a word."""
    model = vit().train()
    with apply(model, ToMe(6)), torch.enable_grad():
        model.set_grad_checkpointing()
        both = model(images()).sum() + model(images()).sum()
        with pytest.raises(NotImplementedError, match="one forward per backward"):
            both.backward()
        model(images()).sum().backward()
        model.set_grad_checkpointing(False)
        (model(images()).sum() + model(images()).sum()).backward()


def test_drop_path_and_dropout_run_in_training() -> None:
    model = vit(drop_path_rate=0.3, proj_drop_rate=0.1, attn_drop_rate=0.1, patch_drop_rate=0.2).train()
    with apply(model, ToMe(6)):
        assert torch.isfinite(gradients(model, model, images())).all()


@pytest.mark.parametrize("make", [vit, lambda: eva(use_rot_pos_emb=True)], ids=["vit", "eva"])
def test_bfloat16(make: Any) -> None:
    model, pixels = make(), images()
    with apply(model, ToMe(6)) as handle:
        wanted = model(pixels)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.isfinite(model(pixels)).all()
        model.bfloat16()
        logits = model(pixels.bfloat16())
        assert handle.stats.tokens[-1] == 26
        assert model._fastok.sizes[-1].dtype == torch.float32
    assert logits.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(logits.float(), wanted).min() > 0.9


def test_compiles_without_graph_breaks() -> None:
    torch._dynamo.reset()
    model, pixels = vit(depth=2, global_pool="avg"), images()
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    plain = compiled(pixels)
    with apply(model, ToMe(6)) as handle:
        merged = model(pixels)
        for _ in range(2):
            assert_same(compiled(pixels), merged)
        assert handle.stats.tokens == []  # nothing is recorded inside a compiled graph
        with pytest.raises(RuntimeError, match="compiled"):
            _ = handle.token_map
        assert_same(model(pixels), merged)
        assert handle.stats.tokens == [44, 38]
    assert_same(compiled(pixels), plain)
    with apply(model, ToMe(6)):
        assert_same(compiled(pixels), merged)
    assert len(graphs) == 2  # one with, one without; neither removal nor a new handle compiles again


def test_compiled_training_and_rope() -> None:
    torch._dynamo.reset()
    model, pixels = eva(depth=2, use_rot_pos_emb=True).train(), images()
    with apply(model, ToMe(6)):
        eager = gradients(model, model, pixels)
        compiled = gradients(model, torch.compile(model, fullgraph=True, backend="aot_eager"), pixels)
    torch.testing.assert_close(compiled, eager)


# ---- errors and other reducers --------------------------------------------------------------------------------------


def test_finds_the_encoder_inside_a_model() -> None:
    model = nn.ModuleDict({"trunk": nn.Sequential(vit(), nn.Softmax(-1))})
    with apply(model, ToMe(6)) as handle:
        model["trunk"](images())
        assert handle.stats.tokens[-1] == 26
    two = nn.ModuleList([vit(), eva()])
    with pytest.raises(ValueError, match=r"several encoders.*0 \(VisionTransformer\), 1 \(Eva\)"):
        apply(two, ToMe(6))


def test_unsupported_models_are_refused() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str 'vit'"):
        apply("vit", ToMe(6))  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"no supported encoder in Linear; supported are timm: VisionTransformer.*ViTModel"
    ):
        apply(nn.Linear(2, 2), ToMe(6))
    parallel = vit(block_fn=timm_vit.ParallelScalingBlock)
    with pytest.raises(TypeError, match=r"ParallelScalingBlock; supported blocks are Block"):
        apply(parallel, ToMe(6))
    assert "_fastok" not in vars(parallel)
    with pytest.raises(TypeError, match="prr"):
        apply(vit(global_pool="prr"), ToMe(6))
    hooked = vit()
    hooked.blocks[2].forward = hooked.blocks[2].forward
    with pytest.raises(TypeError, match="had its forward replaced"):
        apply(hooked, ToMe(6))
    assert all("_fastok" not in vars(module) for module in hooked.modules())


def test_unsupported_calls_are_refused() -> None:
    model = vit()
    with pytest.raises(TypeError, match="reducer must be a reducer"):
        apply(model, 16)
    with pytest.raises(TypeError, match="reducer must be a reducer"):
        apply(model, ToMe)
    with pytest.raises(TypeError, match="takes no place to act at, got layer"):
        apply(model, ToMe(6), layer=3)
    with apply(model, ToMe(6)):
        with pytest.raises(NotImplementedError, match="attention mask"):
            model(images(), attn_mask=torch.zeros(N + 1, N + 1))
        with pytest.raises(NotImplementedError, match="attention mask"):
            model(images(), is_causal=True)
        with pytest.raises(NotImplementedError, match="NLC"):
            model.forward_intermediates(images())
        features = model.forward_intermediates(images(), output_fmt="NLC", intermediates_only=True)
        assert [f.shape[1] for f in features] == [43, 37, 31, 25]


class KeepHalf:
    """A reducer of one's own: every other patch stays, the rest is dropped."""

    needs = ("hidden",)

    def __call__(self, ctx: TokenContext) -> TokenMap:
        kept = torch.cat([torch.arange(ctx.protect), torch.arange(ctx.protect, ctx.hidden.shape[1], 2)])
        return TokenMap.keep(kept.repeat(ctx.hidden.shape[0], 1), ctx.hidden.shape[1])


class Average:
    """A reducer with a SoftMap: one token, the mean of all."""

    needs = ("hidden",)

    def __call__(self, ctx: TokenContext) -> SoftMap:
        return SoftMap.from_dense(torch.full((ctx.hidden.shape[0], 1, ctx.hidden.shape[1]), 1 / ctx.hidden.shape[1]))


def test_any_reducer_can_be_applied() -> None:
    model = vit(global_pool="avg", class_token=False)
    with apply(model, KeepHalf()) as handle:
        model(images())
        assert handle.stats.tokens == [25, 13, 7, 4]
        assert (handle.token_map.assign[0] >= 0).nonzero().flatten().tolist() == [0, 16, 32, 48]
    with apply(model, Average()) as handle:
        model(images())
        assert handle.stats.tokens == [1, 1, 1, 1]
        assert isinstance(handle.token_map, SoftMap)
    rotary = eva(use_rot_pos_emb=True)
    with apply(rotary, Average()), pytest.raises(NotImplementedError, match="one position per token"):
        rotary(images())
    scored = KeepHalf()
    scored.needs = ("last",)
    with pytest.raises(NotImplementedError, match=r"required, last; supported, hidden, keys, .*; missing, last"):
        apply(model, scored)


def test_neither_library_is_imported() -> None:
    code = (
        "import sys, fastok.integrations as i, fastok.reducers as r, torch\n"
        "try: i.apply(torch.nn.Linear(2, 2), r.ToMe(2))\n"
        "except TypeError: pass\n"
        "assert not {'timm', 'transformers', 'torchvision'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
