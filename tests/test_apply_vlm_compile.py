"""torch.compile of reduced vision-language models: LLaVA-1.5 as one graph, the others with one break of ours."""

from typing import Any

import fastok.reducers
import pytest
import torch

transformers = pytest.importorskip("transformers")
import vlm_cases as vlm  # noqa: E402
from fastok import TokenMap, apply  # noqa: E402
from fastok.reducers import DivPrune, FasterVLM, MMTok, TokenCorr, VisionZip  # noqa: E402
from vlm_cases import Every, Picture  # noqa: E402

A, B = Picture(1), Picture(2)


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def llava() -> Any:
    torch.manual_seed(0)
    model = vlm.llava()
    with torch.no_grad():
        model(
            **vlm.LLAVA.inputs([5, A, 6])
        )  # transformers installs hooks in the first call, and no graph may hold that
    return model


@pytest.mark.parametrize("reducer", [DivPrune(keep=6), FasterVLM(keep=6), VisionZip(4, 2), MMTok(keep=6)], ids=repr)
def test_llava_is_one_graph(llava: Any, reducer: Any) -> None:
    first = vlm.LLAVA.inputs([5, A, 6, 7, 8], [5, 4, B, 6, 7])
    second = vlm.LLAVA.inputs([B, 9, 4, 3, 2], [5, 4, 2, 6, A])  # other places, the same shapes
    if "text" in reducer.needs:  # how much text there is would depend on the mask
        first, second = (
            {name: x for name, x in given.items() if name != "attention_mask"} for given in (first, second)
        )
    with apply(llava, reducer) as handle, torch.no_grad():
        expected = [llava(**given).logits for given in (first, second)]
        compiled = torch.compile(llava, fullgraph=True, backend="eager")
        for given, logits in zip((first, second), expected, strict=True):
            torch.testing.assert_close(compiled(**given).logits, logits, atol=1e-5, rtol=1e-4)
        assert handle.stats.tokens == []
        with pytest.raises(RuntimeError, match="a compiled forward records nothing"):
            _ = handle.token_map


def test_a_compiled_model_takes_several_images_padding_and_a_cache(llava: Any) -> None:
    inputs = vlm.LLAVA.inputs([5, A, 6, B, 7, 8], [B, A, 4])
    with apply(llava, DivPrune(keep=6)), torch.no_grad():
        compiled = torch.compile(llava, backend="eager")
        out, expected = compiled(**inputs, use_cache=True), llava(**inputs, use_cache=True)
        torch.testing.assert_close(out.logits, expected.logits, atol=1e-5, rtol=1e-4)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1).long()], 1)
        step = {"input_ids": torch.tensor([[3], [4]]), "attention_mask": mask}
        after = [llava(**step, past_key_values=x.past_key_values).logits for x in (out, expected)]
        torch.testing.assert_close(*after, atol=1e-5, rtol=1e-4)


def test_labels_in_a_graph(llava: Any) -> None:
    inputs = vlm.LLAVA.inputs([5, A, 6, 7, 8], [5, 4, B, 6, 7])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == vlm.IMAGE, -100)
    with apply(llava, DivPrune(keep=6)):
        expected = llava(**inputs, labels=labels).loss
        loss = torch.compile(llava, fullgraph=True, backend="aot_eager")(**inputs, labels=labels).loss
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
        grads = []
        for made in (expected, loss):
            llava.zero_grad()
            made.backward()
            grads.append(llava.model.multi_modal_projector.linear_1.weight.grad.clone())
        llava.zero_grad(set_to_none=True)
        torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-4)


def test_what_a_graph_cannot_hold_is_said_when_it_runs(llava: Any) -> None:
    with apply(llava, DivPrune(keep=6)), torch.no_grad():
        compiled = torch.compile(llava, fullgraph=True, backend="eager")
        with pytest.raises(RuntimeError, match="each prompt must have 36 image placeholders for 1 images of 36 tokens"):
            compiled(**vlm.LLAVA.inputs([5, A, B, 7], [9, 8]))
        inputs = vlm.LLAVA.inputs([5, A, 6, 7])
        ids = inputs["input_ids"].clone()
        ids[0, [1, 0]] = ids[0, [0, 1]]
        with pytest.raises(RuntimeError, match="placeholders of an image must be side by side"):
            compiled(**inputs | {"input_ids": ids})

    class Positive(Every):
        """Does not fill the slots of its map."""

        def __call__(self, ctx: Any) -> Any:
            kept = ctx.hidden[..., 0] > 0
            return TokenMap._trusted(torch.where(kept, kept.cumsum(1) - 1, -1).int(), 36, kept.sum(1).int())

    with (
        apply(llava, Positive(1)),
        torch.no_grad(),
        pytest.raises(RuntimeError, match="Positive left fewer tokens than"),
    ):
        torch.compile(llava, fullgraph=True, backend="eager")(**vlm.LLAVA.inputs([5, A], [5, B]))


def test_methods_whose_budget_depends_on_the_image_break_the_graph_once(llava: Any) -> None:
    ragged = {x for x in fastok.reducers.__all__ if getattr(getattr(fastok.reducers, x), "ragged", False)}
    assert ragged == {"RecoverableCompression", "TokenCorr"}
    inputs = vlm.LLAVA.inputs([5, A, 6, 7], [9, 8])
    with apply(llava, TokenCorr(similarity=0.2)), torch.no_grad():
        expected = llava(**inputs).logits
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"is read on the host|depends on what is in them"):
            torch.compile(llava, fullgraph=True, backend="eager")(**inputs)
        torch.compiler.reset()
        torch.testing.assert_close(torch.compile(llava, backend="eager")(**inputs).logits, expected)


def test_qwen_breaks_once_more_than_it_does_by_itself() -> None:
    case = vlm.MODELS["Qwen2-VL"]
    torch.manual_seed(0)
    model, inputs = case.make(), case.inputs([5, case.pictures[0], 6, 7])
    caches = [transformers.DynamicCache(config=model.config.text_config) for _ in range(2)]
    with torch.no_grad(), apply(model, DivPrune(keep=5)):
        model(**inputs, past_key_values=caches[0])
        explained = torch._dynamo.explain(model)(**inputs, past_key_values=caches[1])
    reasons = [str(x.reason) for x in explained.break_reasons if "/fastok/" in x.user_stack[-1].filename]
    assert all("torch.compiler.disable" in reason for reason in reasons)
    assert len(reasons) <= 2
    assert caches[1].get_seq_length() == 3 + 5
    for eager, compiled in zip(caches[0].layers, caches[1].layers, strict=True):
        torch.testing.assert_close(compiled.keys, eager.keys, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(compiled.values, eager.values, atol=1e-5, rtol=1e-4)


def test_the_reduction_is_the_one_that_was_asked_for(llava: Any) -> None:
    """Not by our eager path: the language model alone, given what is left."""
    prompt = [5, 4, A, 6]

    def left(picture: Picture, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return features[::3], torch.arange(0, 36, 3)

    embeds, _ = vlm.by_hand(vlm.LLAVA, llava, prompt, left)
    expected = vlm.hand_logits(llava, embeds)
    with apply(llava, Every(3)), torch.no_grad():
        logits = torch.compile(llava, fullgraph=True, backend="eager")(**vlm.LLAVA.inputs(prompt)).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
