"""The reducers of image tokens in vision-language models and encoders: they run, keep what they say, and undo nothing.

What models show a reducer is checked in test_apply_vlm_contexts, what is made of a map in test_apply_vlm.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fastok.integrations import apply
from fastok.reducers import (
    VTCCLS,
    AveragePool,
    DivPrune,
    FasterVLM,
    FlowCut,
    FoPru,
    FourierPool,
    GlobalCom2,
    HiPrune,
    HiRED,
    MMTok,
    RecoverableCompression,
    ToDRE,
    TokenCorr,
    VisionZip,
)
from fastok.testing import assert_same

pytest.importorskip("transformers")

from vlm_cases import MODELS, N, clip, siglip, transformers

# What is kept of the 36 tokens of an image of LLaVA-1.5 (None: depends on the image).
LLAVA: list[tuple[Any, int | None]] = [
    (DivPrune(0.3), 11),
    (DivPrune(0.3, compat=True), 11),
    (ToDRE(0.3), 11),
    (FasterVLM(9), 9),
    (VTCCLS(9), 9),
    (FoPru(9), 9),
    (FoPru(18, "row"), 18),
    (HiRED(0.25), 9),
    (GlobalCom2(0.25), 9),
    (GlobalCom2(0.25, compat=True), 9),
    (HiPrune(9, 0.6), 9),
    (FlowCut(9), 9),
    (VisionZip(6, 3), 9),
    (MMTok(9), 9),
    (RecoverableCompression(3), None),
    (TokenCorr(0.5, 0.05), None),
    (AveragePool(4), 9),
    (FourierPool(9), 9),
]
ALL: list[Any] = [
    DivPrune(1.0),
    ToDRE(1.0),
    FasterVLM(1.0),
    VTCCLS(1.0),
    FoPru(1.0, "row"),
    HiRED(1.0),
    GlobalCom2(1.0),
    HiPrune(1.0),
    VisionZip(1.0, 0),
    MMTok(1.0),
    AveragePool(1),
    FourierPool(1.0),
]
CASES = ("LLaVA-1.5", "LLaVA-NeXT", "LLaVA-OneVision", "LLaVA-OneVision, video", "Qwen2-VL", "Qwen2.5-VL")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these tensors are too small to share
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    torch.manual_seed(0)
    return {name: MODELS[name].make() for name in CASES}


def unsupported(name: str, reducer: Any) -> bool:
    """A method that needs a class token in a model that has none, or layers before tokens are pooled."""
    if isinstance(reducer, FlowCut):
        return name == "LLaVA-OneVision, video"
    return isinstance(reducer, RecoverableCompression) and name not in ("LLaVA-1.5", "LLaVA-NeXT")


@pytest.mark.parametrize(("reducer", "tokens"), LLAVA, ids=lambda value: repr(value))
def test_llava_keeps_what_was_asked_for(models: dict[str, Any], reducer: Any, tokens: int | None) -> None:
    case, model = MODELS["LLaVA-1.5"], models["LLaVA-1.5"]
    prompt = [5, 6, case.pictures[0], 7, 8]
    with torch.no_grad(), apply(model, reducer) as handle:
        logits = model(**case.inputs(prompt)).logits
        left = handle.stats.tokens_out[0]
        assert 0 < left < N
        assert tokens in (None, left)
        assert logits.shape[1] == 4 + left
        assert handle.stats.prompts == [(4 + N, 4 + left)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("reducer", [reducer for reducer, _ in LLAVA], ids=repr)
def test_generation(models: dict[str, Any], name: str, reducer: Any) -> None:
    """Two prompts of different images, padded; what is given back is prompt and new tokens."""
    case, model = MODELS[name], models[name]
    inputs = case.inputs([5, case.pictures[0], 7, 8], [6, 6, case.pictures[1], 9])
    if unsupported(name, reducer):
        with (
            pytest.raises((ValueError, NotImplementedError), match=r"class token|vision_cls|tower"),
            apply(model, reducer),
        ):
            model(**inputs)
        return
    with torch.no_grad(), apply(model, reducer) as handle:
        out = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert out.shape == (2, inputs["input_ids"].shape[1] + 2)
        assert_same(out[:, :-2], inputs["input_ids"])
        stats = handle.stats
        assert all(0 < after <= before for before, after in zip(stats.tokens_in, stats.tokens_out, strict=True))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("reducer", ALL, ids=repr)
def test_keeping_all_changes_no_logit(models: dict[str, Any], name: str, reducer: Any) -> None:
    """(HiRED and ToDRE drop newline embeddings whatever they keep.)"""
    case, model = MODELS[name], models[name]
    inputs = case.inputs([5, 6, case.pictures[0], 7, 8])
    with torch.no_grad():
        plain = model(**inputs).logits
        with apply(model, reducer):
            logits = model(**inputs).logits
            if getattr(reducer, "newlines", "all") == "all" or name in ("LLaVA-1.5", "Qwen2-VL", "Qwen2.5-VL"):
                assert_same(logits, plain)
        assert_same(model(**inputs).logits, plain)


@pytest.mark.parametrize("reducer", [r for r, _ in LLAVA if "text" not in r.needs], ids=repr)
@pytest.mark.parametrize("name", ["CLIP", "SigLIP"])
def test_encoders_alone(reducer: Any, name: str) -> None:
    """Once, in the last layer, but FlowCut: in all but the last two."""
    special = name == "CLIP"
    model: Any = (
        transformers.CLIPVisionModel(clip(num_hidden_layers=5)) if special else transformers.SiglipVisionModel(siglip())
    )
    with torch.no_grad(), apply(model.eval(), reducer) as handle:
        model(torch.randn(1, 3, 24, 24))
        tokens = handle.stats.tokens
        assert tokens[0] == (9 if isinstance(reducer, FlowCut) and len(tokens) == 3 else N + special)
        assert tokens[-1] == handle.token_map.n_out or isinstance(reducer, TokenCorr)
        if isinstance(reducer, FlowCut):
            assert tokens[-3:] == [9 + special] * 3
        else:
            assert tokens[:-1] == [N + special] * (len(tokens) - 1)
