"""What a forward of a reduced vision-language model leaves behind, and what of it goes through the projector."""

import copy
import gc
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
import vlm_cases as vlm
from fastok import TokenContext, TokenMap, apply, reducers
from vlm_cases import Case

over_models = pytest.mark.parametrize("case", vlm.MODELS.values(), ids=vlm.MODELS)
LLAVA = vlm.MODELS["LLaVA-1.5"]


def made(case: Case) -> Any:
    torch.manual_seed(0)
    return case.make()


@over_models
def test_nothing_hangs_on_the_graph_of_a_forward(case: Case) -> None:
    model = made(case)
    inputs = case.inputs([5, 6, case.pictures[0], 7, 8])
    with apply(model, reducers.DivPrune(keep=5)):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        with torch.no_grad():
            expected = model(**inputs).logits
            model(**inputs)
        model(**inputs)
        again = copy.deepcopy(model)  # which torch refuses for what has a graph
        with torch.no_grad():
            assert torch.equal(again(**inputs).logits, expected)
        loss.backward()


@over_models
def test_a_forward_leaves_no_cycles(case: Case) -> None:
    def tensors() -> int:
        return sum(type(x) is Tensor for x in gc.get_objects())

    model = made(case)
    inputs = case.inputs([5, 6, case.pictures[0], 7, 8])
    with apply(model, reducers.DivPrune(keep=5)), torch.no_grad():
        model(**inputs)
        gc.collect()
        gc.disable()
        try:
            before = tensors()
            for _ in range(3):
                model(**inputs)
            assert tensors() <= before
        finally:
            gc.enable()


def test_what_is_known_of_a_cache_follows_its_rows() -> None:
    """Prompts that lost different numbers of tokens, exchanged, chosen and repeated between two steps."""
    model, picture = made(LLAVA), LLAVA.pictures[0]
    inputs = LLAVA.inputs([5, 6, picture, 7], [8, 3, 9, 10], [4, picture, 11, picture])
    new = torch.tensor([[20], [21], [22]])
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1).long()], 1)
    with apply(model, reducers.DivPrune(keep=7)), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values

        def step(cache: Any, rows: Tensor) -> Tensor:
            return model(input_ids=new[rows], attention_mask=mask[rows], past_key_values=copy.deepcopy(cache)).logits

        expected = step(cache, torch.arange(3))
        order = torch.tensor([2, 0, 1])
        pickled = io.BytesIO()
        pickle.dump(cache, pickled)
        pickled.seek(0)
        for other in (copy.deepcopy(cache), pickle.load(pickled)):
            assert isinstance(other, type(cache).__mro__[1])
            other.reorder_cache(order)
            torch.testing.assert_close(step(other, order), expected[order])
        few = torch.tensor([2, 1])
        cache.batch_select_indices(few)
        torch.testing.assert_close(step(cache, few), expected[few])
        cache.batch_repeat_interleave(2)
        few = few.repeat_interleave(2)
        torch.testing.assert_close(step(cache, few), expected[few])
        cache.reset()
        assert cache._fastok is None


class Rows:
    """How many tokens of each image a projector was given."""

    def __init__(self, model: Any) -> None:
        self.seen: list[int] = []
        model.model.multi_modal_projector.linear_1.register_forward_pre_hook(self.note)

    def note(self, module: nn.Module, args: tuple[Tensor]) -> None:
        self.seen.append(args[0].shape[1])


@pytest.mark.parametrize(
    "reducer",
    [
        reducers.FasterVLM(keep=5),
        reducers.VTCCLS(keep=5, start=0),
        reducers.FoPru(keep=5),
        reducers.HiRED(keep=5),
        reducers.HiPrune(keep=5),
    ],
    ids=lambda reducer: type(reducer).__name__,
)
def test_those_that_go_by_scores_choose_before_the_projector(reducer: Any) -> None:
    """In a forward and in generate. Features that somebody else sees are of all tokens; the choice is the same."""
    model = made(LLAVA)
    inputs = LLAVA.inputs([5, 6, LLAVA.pictures[0], 7, 8], [LLAVA.pictures[1], 9])
    rows = Rows(model)
    with torch.no_grad():
        plain = model.get_image_features(inputs["pixel_values"]).pooler_output
    rows.seen.clear()
    with apply(model, reducer) as handle, torch.no_grad():
        early = model(**inputs).logits
        maps, stats = handle.token_map, handle.stats
        features = model.get_image_features(inputs["pixel_values"])
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert rows.seen == [5, vlm.N, 5]
        for x, y in zip(features.pooler_output, plain, strict=True):
            assert torch.equal(x, y)
        given = {name: x for name, x in inputs.items() if name != "pixel_values"}
        late = model(**given, mm_encoder_outputs={"image": features}).logits
    torch.testing.assert_close(early, late)
    for a, b in zip(maps, handle.token_map, strict=True):
        assert torch.equal(a.keep_mask, b.keep_mask)
        assert int(a.keep_mask.sum()) == 5
    assert stats.tokens == handle.stats.tokens == [5]


def test_a_choice_that_differs_in_length_before_the_projector() -> None:
    """With gradients, which reach the tokens that stay and no others."""

    class Above:
        needs = ("cls",)

        def __init__(self, by_scores: bool) -> None:
            self.by_scores = by_scores

        def __call__(self, ctx: TokenContext) -> TokenMap:
            scores = ctx.scores["cls"]
            kept = scores > 1.1 * scores.mean(1, keepdim=True)
            counts = kept.sum(1)
            return TokenMap.from_assign(torch.where(kept, kept.cumsum(1) - 1, -1), int(counts.max()), counts)

    model, late = made(LLAVA), made(LLAVA)
    inputs = LLAVA.inputs([5, 6, LLAVA.pictures[0], 7, 8], [LLAVA.pictures[1], 9])
    losses = []
    for each, reducer in ((model, Above(True)), (late, Above(False))):
        with apply(each, reducer) as handle:
            losses.append(each(**inputs, labels=inputs["input_ids"]).loss)
            losses[-1].backward()
            first, second = (int(each.counts) for each in handle.token_map)
            assert first != second
    torch.testing.assert_close(*losses)
    for a, b in zip(model.parameters(), late.parameters(), strict=True):
        if a.grad is None or b.grad is None:
            assert a.grad is b.grad
        else:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_features_of_several_layers() -> None:
    model = vlm.llava(vision_feature_layer=[-2, -1])
    inputs = LLAVA.inputs([5, 6, LLAVA.pictures[0], 7, 8])
    with apply(model, reducers.RecoverableCompression()), torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
    with pytest.raises(NotImplementedError, match=r"vision_feature_layer.*place='output'"):
        apply(model, reducers.ToMe(r=2), place="layers")
    with torch.no_grad():
        model(**inputs)  # as it was
