"""Semantic token protection: which tokens resemble the text, and that a packed cache keeps their values better."""

import math
from typing import Any

import fastok
import pytest
import torch
from fastok import Code, KVFormat, kv_pack, semantic_tokens
from fastok.reference.kv_layout import unpack_bits
from fastok.testing import assert_same
from torch import Tensor

transformers = pytest.importorskip("transformers")
import vlm_cases as vlm  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    fastok.register_transformers()


PROTECTED = KVFormat(
    Code(1.5, "channel"), Code(2, "channel", low_bits=1.58), 16, 16, 8, salient=0.2, later="low"
)  # fmt: skip


# ---- semantic_tokens -------------------------------------------------------------------------------------------------


def published(visual: Tensor, text: Tensor, share: float, compat: bool) -> list[int]:
    """One sample's choice among its visual embeddings ``[Nv,C]``, word by word as spec_kv §1 has it."""
    scores = [sum(float(x @ t) for t in text) / len(text) for x in visual.double()]
    keep = max(32, math.floor(len(visual) * share / 32) * 32)
    best = sorted(sorted(range(len(visual)), key=lambda i: -scores[i])[:keep])
    return best[:-32] if compat else best


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize(("images", "share"), [(40, 0.2), (320, 0.2), (343, 0.5), (20, 0.9), (160, 0.0)])
def test_as_published(images: int, share: float, compat: bool) -> None:
    hidden, visual = torch.randn(2, images + 30, 24), torch.zeros(2, images + 30, dtype=torch.bool)
    visual[0, 11 : 11 + images] = True
    visual[1, torch.randperm(images + 30)[:images]] = True
    chosen = semantic_tokens(hidden, visual, share=share, compat=compat)
    for x, where, got in zip(hidden, visual, chosen, strict=True):
        places = where.nonzero()[:, 0]
        wanted = published(x[where], x[~where].double(), share, compat)
        assert_same(got.nonzero()[:, 0], places[wanted])


def test_padding_is_neither_text_nor_picture() -> None:
    hidden, visual = torch.randn(1, 200, 16), torch.zeros(1, 200, dtype=torch.bool)
    visual[:, 10:150] = True
    alone = semantic_tokens(hidden, visual)
    padded = torch.nn.functional.pad(hidden, (0, 0, 30, 5), value=1e3)
    where, there = (torch.nn.functional.pad(x, (30, 5)) for x in (visual, torch.ones_like(visual)))
    where[:, :7] = True  # whatever padding is said to be
    assert_same(semantic_tokens(padded, where, mask=there), torch.nn.functional.pad(alone, (30, 5)))


def test_ties_nan_and_prompts_of_one_kind() -> None:
    hidden, visual = torch.ones(1, 100, 8), torch.zeros(1, 100, dtype=torch.bool)
    visual[:, 20:] = True
    assert_same(semantic_tokens(hidden, visual).nonzero()[:, 1], torch.arange(20, 52))
    hidden[:, 20:30] = torch.nan
    assert_same(semantic_tokens(hidden, visual).nonzero()[:, 1], torch.arange(30, 62))
    assert not semantic_tokens(hidden, torch.ones_like(visual)).any()
    assert not semantic_tokens(hidden, torch.zeros_like(visual)).any()
    assert semantic_tokens(hidden[:, :0], visual[:, :0]).shape == (1, 0)
    assert semantic_tokens(hidden[:0], visual[:0]).shape == (0, 100)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_in_fp32(dtype: torch.dtype) -> None:
    hidden, visual = torch.randn(2, 300, 64).to(dtype), torch.rand(2, 300) < 0.7
    assert_same(semantic_tokens(hidden, visual), semantic_tokens(hidden.float(), visual))
    compiled = torch.compile(semantic_tokens, fullgraph=True, backend="eager")
    assert_same(compiled(hidden, visual), semantic_tokens(hidden, visual))


def test_bad_arguments() -> None:
    hidden, visual = torch.randn(1, 50, 8), torch.zeros(1, 50, dtype=torch.bool)
    with pytest.raises(TypeError, match="visual must have dtype bool"):
        semantic_tokens(hidden, visual.int())
    with pytest.raises(ValueError, match="mask must"):
        semantic_tokens(hidden, visual, mask=visual[:, 1:])
    with pytest.raises(ValueError, match=r"share must be within \[0, 1\], got 20"):
        semantic_tokens(hidden, visual, share=20)
    with pytest.raises(TypeError, match="compat must be True or False"):
        semantic_tokens(hidden, visual, compat=1)  # type: ignore[arg-type]


# ---- in a cache ------------------------------------------------------------------------------------------------------


def protected(cache: Any, sample: int, layer: int = 0) -> Tensor:
    """Which sealed tokens of a sample are of the high class, ``[G,T]``."""
    kv = cache.layers[layer].kv
    return unpack_bits(kv.classes[sample], kv.format.page).flatten(1)


@torch.no_grad()
@pytest.mark.parametrize("name", ["LLaVA-1.5", "Qwen2-VL", "Qwen2.5-VL"])
def test_the_pictures_that_the_text_is_about(name: str) -> None:
    """Every layer and head protects those tokens of the embeddings, padding left out; generated ones are not."""
    torch.manual_seed(0)
    case = vlm.MODELS[name]
    model = case.make()
    model.set_attn_implementation("fastok")
    first, second = case.pictures[:2]
    inputs = case.inputs([*range(2, 22), first, 30, 31], [40, second, *range(41, 50), first, 51])
    seen: list[Tensor] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    cache = fastok.PackedCache(PROTECTED, model)
    with fastok.protect_semantics(model, cache, share=0.4):
        model.generate(**inputs, past_key_values=cache, max_new_tokens=40, do_sample=False)
    hook.remove()
    visual = torch.isin(inputs["input_ids"], torch.tensor([vlm.IMAGE, vlm.VIDEO]))
    there = inputs["attention_mask"].bool()
    wanted = semantic_tokens(seen[0], visual, share=0.4, mask=there)
    assert wanted.any()
    assert_same(cache.salient, wanted)
    for b in range(2):
        sealed = int(cache.layers[0].kv.counts[b].sum((1, 2))[0])
        own = torch.nn.functional.pad(wanted[b][there[b]], (0, 100))[:sealed]
        for layer in range(2):
            for of_head in protected(cache, b, layer):
                assert_same(of_head[:sealed], own)
    before = cache.salient
    model.generate(**inputs, past_key_values=fastok.PackedCache(PROTECTED, model), max_new_tokens=2)  # nothing is left
    assert cache.salient is before


@torch.no_grad()
def test_protected_values_are_nearer() -> None:
    model = vlm.MODELS["LLaVA-1.5"].make()
    prompt = torch.randint(2, 90, (1, 120))
    marks = torch.rand(1, 120) < 0.4
    for attention in ("fastok", "sdpa"):
        model.set_attn_implementation(attention)
        exact, cache = transformers.DynamicCache(), fastok.PackedCache(PROTECTED, model, salient=marks)
        for target in (exact, cache):
            model(prompt, past_key_values=target)
        values = exact.layers[0].values
        assert_same(protected(cache, 0), marks[:, :112].expand(2, -1))
        error = (cache.layers[0].unpacked()[1] - values)[..., :112, :].square().mean((1, 3))[0]
        assert error[marks[0, :112]].mean() < error[~marks[0, :112]].mean()
        assert (error[:112] > 0).all()


@torch.no_grad()
def test_a_prompt_in_chunks() -> None:
    model = vlm.MODELS["LLaVA-1.5"].make()
    model.set_attn_implementation("fastok")
    prompt, marks = torch.randint(2, 90, (1, 100)), torch.rand(1, 100) < 0.4
    cache = fastok.PackedCache(PROTECTED, model, salient=marks)
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False}
    model.generate(prompt, past_key_values=cache, prefill_chunk_size=30, **options)
    wanted = torch.nn.functional.pad(marks, (0, 100))[0]  # generated ones are not protected
    for of_head in protected(cache, 0):
        assert_same(of_head, wanted[: len(of_head)])
    assert len(of_head) == 128


@torch.no_grad()
def test_compiled_steps_are_not_protected() -> None:
    model = vlm.MODELS["LLaVA-1.5"].make()
    model.set_attn_implementation("fastok")
    prompt, marks = torch.randint(2, 90, (1, 50)), torch.ones(1, 50, dtype=torch.bool)
    cache = fastok.PackedCache(PROTECTED, model, salient=marks)
    model(prompt, past_key_values=cache)
    step = torch.compile(
        lambda tokens: model(tokens, past_key_values=cache).logits, fullgraph=True, backend="aot_eager"
    )
    for _ in range(40):
        step(prompt[:, :1])
    assert_same(protected(cache, 0)[0], torch.arange(80) < 50)


@torch.no_grad()
def test_beams_share_what_is_marked() -> None:
    model = vlm.MODELS["LLaVA-1.5"].make()
    model.set_attn_implementation("fastok")
    cache = fastok.PackedCache(PROTECTED, model, salient=torch.rand(1, 60) < 0.3)
    model.generate(torch.randint(2, 90, (1, 60)), past_key_values=cache, num_beams=3, max_new_tokens=4)
    assert_same(protected(cache, 2)[0], cache.salient[0, :48])


def test_what_cannot_be_protected() -> None:
    model = vlm.MODELS["LLaVA-1.5"].make()
    model.set_attn_implementation("fastok")
    cache = fastok.PackedCache(PROTECTED, model)
    with pytest.raises(TypeError, match=r"cache must be a fastok\.PackedCache, got DynamicCache"):
        fastok.protect_semantics(model, transformers.DynamicCache()).__enter__()
    with pytest.raises(ValueError, match="cache must be of a format of two classes"):
        fastok.protect_semantics(model, fastok.PackedCache("kivi-2", model)).__enter__()
    with pytest.raises(ValueError, match="model must be a vision-language model of transformers"):
        fastok.protect_semantics(model.get_decoder(), cache).__enter__()
    embeddings = model.get_input_embeddings()(torch.randint(2, 90, (1, 30)))
    with fastok.protect_semantics(model, cache), pytest.raises(ValueError, match="input_ids must be given"):
        model(inputs_embeds=embeddings, past_key_values=cache)
    with pytest.raises(ValueError, match="salient must be None for a format with one class"):
        fastok.PackedCache("kivi-2", salient=torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(TypeError, match="salient must have dtype bool"):
        cache.salient = torch.ones(1, 5)
    wrong = fastok.PackedCache(PROTECTED, model, salient=torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"salient must be \[B,T\] of the prompt, at least \[1, 30\]; got \[1, 5\]"):
        model(torch.randint(2, 90, (1, 30)), past_key_values=wrong)


def test_a_page_of_one_class_is_as_without_classes() -> None:
    """Byte for byte; so protection costs nothing where nothing is protected."""
    k, v = torch.randn(2, 1, 256, 2, 64).unbind(0)
    plain = {
        bits: kv_pack(k, v, KVFormat(Code(1.5, "channel"), Code(bits, "channel"), 64, 64, 0)) for bits in (2, 1.58)
    }
    fmt = KVFormat(Code(1.5, "channel"), Code(2, "channel", low_bits=1.58), 64, 64, 0, later="low")
    high = torch.zeros(1, 2, 256, dtype=torch.bool)
    high[:, 0, 64:128] = high[:, 1, 192:] = True
    cache = kv_pack(k, v, fmt, salient=high)
    for head in range(2):
        for page in range(4):
            bits = 2 if bool(high[0, head, 64 * page]) else 1.58
            assert_same(cache.record(0, head, page), plain[bits].record(0, head, page))
    unmarked = kv_pack(k, v, fmt)  # all are `later`
    assert all(torch.equal(unmarked.record(0, g, p), plain[1.58].record(0, g, p)) for g in range(2) for p in range(4))
