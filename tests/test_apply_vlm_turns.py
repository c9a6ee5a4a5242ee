"""Conversations of several turns with the reducer in the model with its head, and in the one without."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
import vlm_cases as vlm
from fastok import apply
from vlm_cases import Case, Every, Prompt

over_models = pytest.mark.parametrize("case", vlm.MODELS.values(), ids=vlm.MODELS)
NEW = 4


@pytest.fixture(scope="module")
def models() -> dict[int, nn.Module]:
    return {}


@pytest.fixture
def model(case: Case, models: dict[int, nn.Module]) -> Any:
    if id(case) not in models:
        torch.manual_seed(0)
        models[id(case)] = case.make()
        models[id(case)].lm_head.weight.data[vlm.VIDEO :] = 0  # so as not to say placeholders
    return models[id(case)]


def generate(model: Any, inputs: dict[str, Any], **more: Any) -> Any:
    return model.generate(
        **{"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True} | inputs | more
    )


def second(case: Case, first: Prompt, said: list[int], more: Prompt) -> dict[str, Any]:
    """The whole conversation, without the images of its first turn, which are in the cache."""
    whole = case.inputs([*first, *said, *more])
    return {name: whole[name] for name in ("input_ids", "attention_mask", "mm_token_type_ids") if name in whole}


@over_models
def test_a_model_without_its_head_in_a_loop(case: Case, model: Any) -> None:
    """What `generate` of the whole model says in a second turn, a loop around the inner model says too."""
    first, more = [5, case.pictures[0], 6, 7], [8, 9, 3]
    inputs = case.inputs(first)
    with apply(model, Every(3)):
        out = generate(model, inputs)
        said = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        whole = second(case, first, said, more)
        expected = generate(model, whole, past_key_values=copy.deepcopy(out.past_key_values)).sequences[:, -NEW:]
        fresh = generate(model, case.inputs([*first, *said, *more])).sequences[:, -NEW:]
        assert torch.equal(expected, fresh)

    def step(ids: Tensor, cache: Any, mask: Tensor | None, **images: Any) -> tuple[Tensor, Any]:
        out = model.model(input_ids=ids, past_key_values=cache, attention_mask=mask, use_cache=True, **images)
        return model.lm_head(out.last_hidden_state[:, -1:]).argmax(-1), out.past_key_values

    with apply(model.model, Every(3)), torch.no_grad():
        for masked in (True, False):
            images = {name: x for name, x in inputs.items() if name not in ("input_ids", "attention_mask")}
            mask = inputs["attention_mask"] if masked else None
            token, cache = step(inputs["input_ids"], None, mask, **images)
            seen = inputs["input_ids"].shape[1]
            for ids in [[token] for token in said[:-1]]:
                seen += 1
                assert token.tolist() == [ids]
                token, cache = step(torch.tensor([ids]), cache, torch.ones(1, seen).long() if masked else None)
            new, words = [], torch.tensor([[said[-1], *more]])
            for _ in range(NEW):
                seen += words.shape[1]
                words, cache = step(words, cache, torch.ones(1, seen).long() if masked else None)
                new.append(words)
            assert torch.equal(torch.cat(new, 1), expected)


@over_models
def test_a_head_that_was_not_told_generates_the_same_or_says_so(case: Case, model: Any) -> None:
    """Its second turn would repeat what the cache holds: as many tokens as the cache is shorter than it stands for."""
    picture = case.pictures[0]
    first, more = [5, picture, 6, 7], [8, 9, 3]
    inputs = case.inputs(first)
    with apply(model, Every(3)):
        expected = generate(model, inputs).sequences
        beams = None if picture.frames else generate(model, inputs, num_beams=2).sequences
    with apply(model.model, Every(3)) as handle:
        out = generate(model, inputs)
        assert torch.equal(out.sequences, expected)
        if beams is not None:
            assert torch.equal(generate(model, inputs, num_beams=2).sequences, beams)
        said = expected[0, inputs["input_ids"].shape[1] :].tolist()
        (before, after), *_ = handle.stats.prompts
        whole = second(case, first, said, more)
        message = (
            rf"input_ids must be the tokens behind the {before + NEW - 1} that past_key_values .* {before - after} of"
        )
        for given in (whole, {"input_ids": whole["input_ids"]}):
            with pytest.raises(ValueError, match=message):
                generate(model, given, past_key_values=copy.deepcopy(out.past_key_values))
        new = {"input_ids": whole["input_ids"][:, -len(more) - 1 :], "attention_mask": whole["attention_mask"]}
        again = generate(model, new, past_key_values=out.past_key_values).sequences[0, -NEW:]
        padded = case.inputs(first, [9, 9])
        cache = generate(model, padded).past_key_values
        ids, mask = padded["input_ids"], padded["attention_mask"]
        longer = {
            "input_ids": torch.cat([ids, ids.new_full((2, NEW + 3), 4)], 1),
            "attention_mask": torch.cat([mask, mask.new_ones(2, NEW + 3)], 1),
        }
        with pytest.raises(ValueError, match=r"attention_mask must be of the tokens .* apply the reducer to the whole"):
            generate(model, longer, past_key_values=cache)
    with apply(model, Every(3)):
        assert torch.equal(again, generate(model, case.inputs([*first, *said, *more])).sequences[0, -NEW:])


@over_models
def test_positions_that_a_caller_gives_may_go_on_anywhere_behind_the_cache(case: Case, model: Any) -> None:
    first = [5, case.pictures[0], 6, 7]
    inputs, other = case.inputs(first), case.inputs([9, 8], first)
    with apply(model, Every(3)), torch.no_grad():
        for given in (inputs, other):
            ids, mask = given["input_ids"], given["attention_mask"]
            cache = model(**given, use_cache=True).past_key_values
            more = torch.tensor([[8, 9]]).repeat(len(ids), 1)
            whole = torch.cat([mask, mask.new_ones(len(ids), 2)], 1)
            positions = (whole.cumsum(1) - 1)[:, -2:]
            go_on = {"input_ids": more, "attention_mask": whole}
            if not case.keeps_positions:
                same = model(**go_on, position_ids=positions, past_key_values=copy.deepcopy(cache)).logits
                if given is inputs:  # where there is padding, the language model itself would count it
                    plain = model(**go_on, past_key_values=copy.deepcopy(cache)).logits
                    torch.testing.assert_close(same, plain, atol=1e-5, rtol=1e-4)
            with pytest.raises(ValueError, match="position_ids say that 2 of them come again"):
                model(**go_on, position_ids=positions - 2, past_key_values=cache)
