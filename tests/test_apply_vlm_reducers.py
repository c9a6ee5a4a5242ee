"""Every published method that fastok has, in every vision-language model."""

import dataclasses
from typing import Any

import fastok.reducers
import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
import vlm_cases as vlm  # noqa: E402
from fastok import apply  # noqa: E402
from vlm_cases import Case  # noqa: E402

METHODS = {
    name: method
    for name in sorted(fastok.reducers.__all__)
    if dataclasses.is_dataclass(method := getattr(fastok.reducers, name)) and name != "TokenContext"
}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "ToMe": {"r": 3},
    "EViT": {"keep": 0.5, "layers": (0,)},
    "VisionZip": {"dominant": 4, "contextual": 2},
    "AveragePool": {"stride": 2},
    "TokenCorr": {"similarity": 0.2},
    "RecoverableCompression": {"clusters": 2},
}
IN_LAYERS = ("ToMe", "EViT", "FlowCut")
CLASS_TOKEN = ("EViT", "RecoverableCompression")
NEW = 3
over_models = pytest.mark.parametrize("name", vlm.MODELS)


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {}


@pytest.fixture
def model(name: str, models: dict[str, nn.Module]) -> Any:
    if name not in models:
        torch.manual_seed(0)
        models[name] = vlm.MODELS[name].make()
        models[name].lm_head.weight.data[vlm.VIDEO :] = 0  # so as not to say placeholders
    return models[name]


def refused(method: Any, name: str) -> str | None:
    """The message with which a model says that it cannot show what the method needs, if it cannot."""
    if method.__name__ in ("ToMe", "EViT") and name.startswith("Qwen"):
        return "in the layers of Qwen2.*VLModel's vision tower: required"
    if method.__name__ in CLASS_TOKEN and name not in ("LLaVA-1.5", "LLaVA-NeXT"):
        return "a class token"
    if method.__name__ in IN_LAYERS and name in ("LLaVA-OneVision, video", "LLaVA-OneVision, resampled"):
        return "place='layers': required, tokens that are pooled or resampled"
    return None


@over_models
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_methods_in_models(method: Any, name: str, model: Any) -> None:
    case: Case = vlm.MODELS[name]
    a, b, _ = case.pictures
    prompts = ([5, a, 6, 7], [8, 9], [4, b, 3])
    inputs = case.inputs(*prompts)
    reducer = method(**ARGUMENTS.get(method.__name__, {"keep": 5}))
    message = refused(method, name)
    if message is not None:
        with pytest.raises((NotImplementedError, ValueError), match=message), apply(model, reducer):
            model(**inputs)
        assert all("_fastok" not in vars(module) for module in model.modules())
        return
    with apply(model, reducer) as handle, torch.no_grad():
        together = model(**inputs).logits
        before, after, lengths = handle.stats.tokens_in, handle.stats.tokens_out, handle.stats.prompts
        assert len(handle.token_map) == 2
        assert before == [case.tokens(a), case.tokens(b)]
        assert all(0 < left < count for left, count in zip(after, before, strict=True))
        assert together.shape[1] == max(left for _, left in lengths)
        new = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[:, -NEW:]
        for i, prompt in enumerate(prompts):
            own = case.inputs(prompt)
            alone = model(**own).logits
            assert alone.shape[1] == lengths[i][1]
            torch.testing.assert_close(together[i, -alone.shape[1] :], alone[0], atol=5e-5, rtol=1e-4)
            assert new[i].tolist() == model.generate(**own, max_new_tokens=NEW, do_sample=False)[0, -NEW:].tolist()


KEEPING = [
    pytest.param(method, name, id=f"{method.__name__}-{name}")
    for method in METHODS.values()
    for name in vlm.MODELS
    if "keep" in {field.name for field in dataclasses.fields(method)} and refused(method, name) is None
]


@pytest.mark.parametrize(("method", "name"), KEEPING)
def test_a_budget_above_all_tokens_keeps_them(method: Any, name: str, model: Any) -> None:
    case: Case = vlm.MODELS[name]
    a, b, _ = case.pictures
    inputs = case.inputs([5, a, 6, 7], [8, 9], [4, b, 3])
    with torch.no_grad():
        expected = model(**inputs).logits
        with apply(model, method(keep=100_000)) as handle:
            logits = model(**inputs).logits
    if getattr(method, "newlines", "all") == "all" or name == "LLaVA-1.5" or case.keeps_positions:
        assert torch.equal(logits, expected)
    else:
        assert handle.stats.tokens_out == [len(case.order(picture)) for picture in (a, b)]
