"""fastok.apply on whole vision-language models: what is left of a prompt, and all the ways to run one."""

import copy
from typing import Any

import fastok
import pytest
import torch
from fastok.reducers import EViT, ToMe
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
import vlm_cases as vlm  # noqa: E402
from fastok import apply  # noqa: E402
from vlm_cases import Case, Every, Fused, Pairs, Picture, Ragged  # noqa: E402

over_models = pytest.mark.parametrize("case", vlm.MODELS.values(), ids=vlm.MODELS)
NEW = 5


@pytest.fixture(scope="module")
def models() -> dict[int, nn.Module]:
    return {}


@pytest.fixture
def model(case: Case, models: dict[int, nn.Module]) -> Any:
    """One of each class for all tests, which leave it as it was."""
    if id(case) not in models:
        torch.manual_seed(0)
        models[id(case)] = case.make()
        models[id(case)].lm_head.weight.data[vlm.VIDEO :] = 0  # so as not to say placeholders
    return models[id(case)]


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Any], **more: Any) -> Tensor:
    return model(**inputs, **more).logits


@torch.no_grad()
def generate(model: Any, inputs: dict[str, Any], **more: Any) -> Any:
    return model.generate(**{"max_new_tokens": NEW, "do_sample": False} | inputs | more)


def kept_by(case: Case, step: int) -> Any:
    """`by_hand`'s rule for what ``Every(step)`` leaves."""

    def left(picture: Picture, features: Tensor) -> tuple[Tensor, Tensor]:
        places = case.kept(picture, Every(step).kept(*case.crops(picture))).nonzero()[:, 0]
        return features[places], places

    return left


def positions(case: Case, model: Any, inputs: dict[str, Any], columns: Tensor) -> Tensor | None:
    """Those of the original prompt at these columns, for models that keep them."""
    if not case.keeps_positions:
        return None
    wanted = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
    found, _ = model.model.get_rope_index(**{name: inputs[name] for name in wanted if name in inputs})
    return found[:, :, columns]


@over_models
def test_keeping_all_tokens_changes_nothing(case: Case, model: Any) -> None:
    a, b, c = case.pictures
    for inputs in (
        case.inputs([5, a, 6, 7]),
        case.inputs([5, a, 6, b, 7], [8, 9, c], [4, 3]),
        case.inputs([5, a, 6, b, 7], [8, 9, c], [4, 3], side="right"),
        case.inputs([5, a, 6, 7], mask=False),
    ):
        expected, sequences = logits(model, inputs), generate(model, inputs)
        beams = generate(model, inputs, num_beams=3)
        with apply(model, Every(1)) as handle:
            assert torch.equal(logits(model, inputs), expected)
            assert torch.equal(generate(model, inputs), sequences)
            assert torch.equal(generate(model, inputs, num_beams=3), beams)
        assert handle.stats.tokens_in == handle.stats.tokens_out
        assert torch.equal(logits(model, inputs), expected)


@over_models
def test_leaving_restores_the_model(case: Case, model: Any) -> None:
    before = [(type(module), dict(vars(module))) for module in model.modules()]
    inputs = case.inputs([5, case.pictures[0], 6])
    expected = logits(model, inputs)
    handle = apply(model, Every(2, ("hidden", "column", "keys")))
    with pytest.raises(ValueError, match="a reducer is applied to this model already"):
        apply(model, Every(2))
    assert logits(model, inputs).shape != expected.shape
    handle.remove()
    for module, (kind, attributes) in zip(model.modules(), before, strict=True):
        assert type(module) is kind
        assert vars(module).keys() - {"rope_deltas"} == attributes.keys() - {"rope_deltas"}
    assert torch.equal(logits(model, inputs), expected)
    assert len(handle.token_map) == 1


@over_models
def test_the_language_model_is_given_what_is_left(case: Case, model: Any) -> None:
    a, b, _ = case.pictures
    for prompt in ([5, 4, a, 6, 7], [a, 3, b, 5, 6], [5, a, 3, 2, b, 4]):
        inputs = case.inputs(prompt)
        embeds, columns = vlm.by_hand(case, model, prompt, kept_by(case, 3))
        expected = vlm.hand_logits(model, embeds, positions(case, model, inputs, columns))
        with apply(model, Every(3)) as handle:
            for given in (inputs, {name: x for name, x in inputs.items() if name != "attention_mask"}):
                assert torch.equal(logits(model, given), expected)
        assert handle.stats.prompts == [(inputs["input_ids"].shape[1], len(columns))]


@over_models
def test_generation_goes_on_from_what_is_left(case: Case, model: Any) -> None:
    prompt = [5, 4, case.pictures[0], 6, case.pictures[1], 7]
    inputs = case.inputs(prompt)
    embeds, columns = vlm.by_hand(case, model, prompt, kept_by(case, 3))
    place, expected = positions(case, model, inputs, columns), []
    with torch.no_grad():
        for _ in range(NEW):
            token = vlm.hand_logits(model, embeds, place)[0, -1].argmax()
            expected.append(int(token))
            embeds = torch.cat([embeds, model.get_input_embeddings()(token)[None, None]], 1)
            place = (
                None
                if place is None
                else torch.cat([place, place[..., -1:].amax(0, keepdim=True).expand(3, -1, -1) + 1], -1)
            )
    with apply(model, Every(3)):
        out = generate(model, inputs, return_dict_in_generate=True)
        assert out.past_key_values.get_seq_length() == len(columns) + NEW - 1
        assert out.sequences.tolist() == [inputs["input_ids"][0].tolist() + expected]
        assert torch.equal(generate(model, inputs, use_cache=False), out.sequences)
        assert torch.equal(generate(model, inputs, attention_mask=None), out.sequences)


@over_models
@pytest.mark.parametrize("reducer", [Pairs(), Fused()], ids=["merged", "weighted"])
def test_what_is_merged_stands_in_the_prompt(case: Case, model: Any, reducer: Any) -> None:
    picture = case.pictures[0]
    prompt = [5, picture, 6, 7]
    inputs = case.inputs(prompt)
    if len(case.order(picture)) < torch.Size(case.crops(picture)).numel():
        pytest.skip("not all tokens of this image are in the prompt")

    def left(picture: Picture, features: Tensor) -> tuple[Tensor, Tensor]:
        crops = case.crops(picture)
        is_newline = case.kept(picture, torch.zeros(*crops, dtype=torch.bool))
        token = torch.full((len(features),), -1)
        token[~is_newline] = case.order(picture)
        rows, at, key = [], [], []
        for crop in range(crops[0]):
            for slot in range(-(-crops[1] // 2) if isinstance(reducer, Pairs) else 6):
                if isinstance(reducer, Pairs):
                    members = [crop * crops[1] + i for i in (2 * slot, 2 * slot + 1) if i < crops[1]]
                    weight = 1 / len(members)
                elif slot < 5:
                    members, weight = [(crop + 1) * crops[1] - 1 - slot], 1.0
                else:
                    members, weight = list(range(crop * crops[1], (crop + 1) * crops[1])), 1.0
                found = [int((token == i).nonzero()) for i in members]
                rows.append((features[found] * weight).sum(0))
                at.append(min(found))
                key.append(crop * crops[1] + slot if crop < case.together(picture) else min(found))
        for newline in (token < 0).nonzero()[:, 0].tolist():
            rows.append(features[newline])
            at.append(newline)
            key.append(newline)
        order = torch.tensor(key).sort(stable=True).indices
        return torch.stack(rows)[order], torch.tensor(at)[order]

    embeds, columns = vlm.by_hand(case, model, prompt, left)
    expected = vlm.hand_logits(model, embeds, positions(case, model, inputs, columns))
    with apply(model, reducer) as handle:
        torch.testing.assert_close(logits(model, inputs), expected, atol=1e-5, rtol=1e-4)
    assert handle.stats.prompts[0][1] == len(columns)


@over_models
@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_of_a_batch_are_independent(case: Case, model: Any, side: str) -> None:
    a, b, c = case.pictures
    prompts = ([5, a, 6, b, 7, 8], [9, 3, 4], [c, 6], [5, 5, 5, a, 2, 2, 2])
    inputs = case.inputs(*prompts, side=side)
    with apply(model, Ragged()) as handle:
        together = logits(model, inputs)
        lengths, tokens = handle.stats.prompts, handle.stats.tokens_out
        assert together.shape[1] == max(after for _, after in lengths)
        assert [before for before, _ in lengths] == inputs["attention_mask"].sum(1).tolist()
        assert len(set(tokens)) > 1
        assert handle.stats.tokens == [tokens]
        for i, prompt in enumerate(prompts):
            own = case.inputs(prompt)
            alone = logits(model, own)
            here = slice(together.shape[1] - lengths[i][1], None) if side == "left" else slice(lengths[i][1])
            assert alone.shape[1] == lengths[i][1]
            torch.testing.assert_close(together[i : i + 1, here], alone, atol=2e-5, rtol=1e-4)
        if side == "left":
            new = generate(model, inputs)[:, -NEW:]
            beams = generate(model, inputs, num_beams=2)[:, -NEW:]
            for i, prompt in enumerate(prompts):
                assert new[i].tolist() == generate(model, case.inputs(prompt))[0, -NEW:].tolist()
                assert beams[i].tolist() == generate(model, case.inputs(prompt), num_beams=2)[0, -NEW:].tolist()


@over_models
def test_a_batch_without_padding_that_needs_some(case: Case, model: Any) -> None:
    a, b, _ = case.pictures
    prompts = ([5, a, 6, 7, 8], [9, a, 3, 4, 2]) if case.tokens(a) != case.tokens(b) else ([5, a, 6], [9, b, 3])

    class Some:
        """Keeps fewer tokens at each call."""

        needs = ("hidden",)
        calls = 0

        def __call__(self, ctx: Any) -> Any:
            self.calls += 1
            batch, n = ctx.hidden.shape[:2]
            return vlm.TokenMap.keep(torch.arange(max(n - 5 * self.calls, 1)).repeat(batch, 1), n)

    inputs = case.inputs(*prompts)
    assert bool(inputs["attention_mask"].all())
    with apply(model, Some()) as handle:
        new = generate(model, inputs)[:, -NEW:].tolist()
        (_, first), (_, second) = handle.stats.prompts
    assert first > second
    with apply(model, Some()):
        assert new == [generate(model, case.inputs(prompt))[0, -NEW:].tolist() for prompt in prompts]


@over_models
def test_a_second_turn_goes_on_from_the_cache(case: Case, model: Any) -> None:
    picture = case.pictures[0]
    first, more = [5, picture, 6, 7], [8, 9, 3]
    with apply(model, Every(3)):
        inputs = case.inputs(first)
        out = generate(model, inputs, return_dict_in_generate=True)
        said = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        whole = case.inputs([*first, *said, *more])
        expected = generate(model, whole)
        text = {name: whole[name] for name in ("input_ids", "attention_mask", "mm_token_type_ids") if name in whole}
        cached = out.past_key_values.get_seq_length()
        again = generate(model, text, past_key_values=copy.deepcopy(out.past_key_values), return_dict_in_generate=True)
        assert torch.equal(again.sequences, expected)
        assert again.past_key_values.get_seq_length() == cached + 1 + len(more) + NEW - 1
        new = text["input_ids"][:, -len(more) - 1 :]
        only_new = generate(
            model, {"input_ids": new, "attention_mask": text["attention_mask"]}, past_key_values=out.past_key_values
        )
        assert only_new[0, -NEW:].tolist() == expected[0, -NEW:].tolist()


@over_models
def test_an_image_later_in_the_conversation(case: Case, model: Any) -> None:
    first, more = [5, 4, 3], [8, case.pictures[0], 9]
    with apply(model, Every(3)) as handle:
        out = generate(model, case.inputs(first), return_dict_in_generate=True)
        whole = case.inputs([*first, *out.sequences[0, len(first) :].tolist(), *more])
        expected = generate(model, whole)
        again = generate(model, whole, past_key_values=out.past_key_values, return_dict_in_generate=True)
        assert torch.equal(again.sequences, expected)
        assert again.past_key_values.get_seq_length() == handle.stats.prompts[0][1] + len(first) + NEW - 1 + NEW - 1


@over_models
def test_a_loop_without_generate(case: Case, model: Any) -> None:
    a, b, _ = case.pictures
    prompts = ([5, a, 6, b, 7], [9, 3, a])
    inputs = case.inputs(*prompts)
    with apply(model, Ragged()), torch.no_grad():
        expected = generate(model, inputs)[:, -NEW:]
        out, tokens, mask = model(**inputs, use_cache=True), [], inputs["attention_mask"]
        for _ in range(NEW):
            tokens.append(out.logits[:, -1].argmax(-1))
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            step = {"input_ids": tokens[-1][:, None], "past_key_values": out.past_key_values}
            out = model(**step, attention_mask=mask)
        assert torch.equal(torch.stack(tokens, 1), expected)
        with pytest.raises(ValueError, match="attention_mask must be of the tokens of the prompt as it was before"):
            model(**step, attention_mask=mask[:, 1:])


@over_models
def test_caches_of_other_kinds_and_sampling(case: Case, model: Any) -> None:
    inputs = case.inputs([5, case.pictures[0], 6, 7], [9, 3, case.pictures[1]])
    with apply(model, Ragged()):
        expected = generate(model, inputs)
        assert torch.equal(generate(model, inputs, cache_implementation="static"), expected)
        torch.manual_seed(1)
        several = generate(model, inputs, do_sample=True, num_return_sequences=3)
        assert several.shape == (6, expected.shape[1])
        torch.manual_seed(1)
        assert torch.equal(several, generate(model, inputs, do_sample=True, num_return_sequences=3))
        with pytest.raises(NotImplementedError, match="mm_encoder_outputs: required, image features that carry"):
            generate(model, inputs, prefill_chunk_size=8)


@over_models
def test_labels_are_shortened_and_gradients_flow(case: Case, model: Any) -> None:
    a, b, _ = case.pictures
    prompts = ([5, a, 6, 7, 2], [9, b, 3])
    inputs = case.inputs(*prompts)
    labels = inputs["input_ids"].masked_fill((inputs["input_ids"] >= vlm.VIDEO) | (inputs["attention_mask"] == 0), -100)
    labels = labels.masked_fill((labels == 5) | (labels == 9), -100)  # what follows padding has no prediction
    with apply(model, Ragged()):
        for given in ({}, {"attention_mask": None}):
            out = model(**inputs | given, labels=labels)
            rows = [logits(model, case.inputs(prompt)) for prompt in prompts] if not given else []
            losses = [
                nn.functional.cross_entropy(row[0, -len(words) - 1 : -1], torch.tensor(words), reduction="sum")
                for row, words in zip(rows, ([6, 7, 2], [3]), strict=False)
            ]
            if losses:
                torch.testing.assert_close(out.loss, sum(losses) / 4, atol=1e-5, rtol=1e-5)
        model.zero_grad()
        out.loss.backward()
        tower = getattr(model.model, "vision_tower", None) or model.model.visual
        assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in tower.parameters())
        model.zero_grad()
        plain = model(**case.inputs([5, 6, 7]), labels=torch.tensor([[5, 6, 7]])).loss
    torch.testing.assert_close(plain, model(**case.inputs([5, 6, 7]), labels=torch.tensor([[5, 6, 7]])).loss)


@over_models
def test_errors(case: Case, model: Any) -> None:
    picture = case.pictures[0]
    inputs = case.inputs([5, picture, 6])
    with apply(model, Every(2)):
        wrong = {
            name: x[:, :-2]
            for name, x in inputs.items()
            if name in ("input_ids", "attention_mask", "mm_token_type_ids")
        }
        with pytest.raises(
            ValueError, match=r"placeholders for 1 (image|video)s of \d+ tokens: processor and model disagree"
        ):
            logits(model, inputs | wrong)
        with pytest.raises(NotImplementedError, match="logits_to_keep: required, the logits of single tokens"):
            logits(model, inputs, logits_to_keep=torch.tensor([1]))
        width = inputs["input_ids"].shape[1]
        with pytest.raises(NotImplementedError, match="attention_mask: required, "):
            logits(model, inputs | {"attention_mask": torch.ones(1, 1, width, width)})
        with pytest.raises(NotImplementedError, match="cu_seq_lens_q: required, packed prompts"):
            logits(model, inputs, cu_seq_lens_q=torch.tensor([0, width]))
    with pytest.raises(NotImplementedError, match="Every before a language model: required, last; supported, hidden"):
        apply(model, Every(2, ("last",)))

    class Grows(Every):
        def __call__(self, ctx: Any) -> Any:
            return vlm.TokenMap.identity(len(ctx.hidden), ctx.hidden.shape[1] + 1)

    class Nothing(Every):
        def __call__(self, ctx: Any) -> Any:
            return ctx.hidden

    with apply(model, Grows(2)), pytest.raises(ValueError, match="Grows must return a map of"):
        logits(model, inputs)
    with apply(model, Nothing(2)), pytest.raises(TypeError, match="Nothing must return a TokenMap or a SoftMap"):
        logits(model, inputs)
    assert torch.isfinite(logits(model, inputs)).all()


@over_models
@pytest.mark.parametrize("attention", ["eager", "sdpa", "fastok"])
def test_scores_do_not_change_the_tower(case: Case, model: Any, attention: str) -> None:
    fastok.register_transformers()
    changed = copy.deepcopy(model)
    changed.set_attn_implementation(attention)
    inputs = case.inputs([5, case.pictures[0], 6, case.pictures[1]])
    expected = logits(changed, inputs)
    with apply(changed, Every(1, ("cls", "column", "column:all", "cls:logit", "keys", "values"))) as handle:
        assert torch.equal(logits(changed, inputs), expected)
        assert handle.stats.seconds > 0


@over_models
def test_published_merging_before_the_language_model(case: Case, model: Any) -> None:
    picture = case.pictures[0]
    with apply(model, ToMe(r=4), place="output") as handle:
        new = generate(model, case.inputs([5, picture, 6, 7]))
    assert new.shape[1] == case.tokens(picture) + 3 + NEW
    (token_map,), crops = handle.token_map, case.crops(picture)
    assert token_map.assign.shape == crops
    assert token_map.n_out == crops[1] - 4


STITCHED = {name: case for name, case in vlm.MODELS.items() if name in ("LLaVA-1.5", "LLaVA-NeXT", "LLaVA-OneVision")}


@pytest.mark.parametrize("case", STITCHED.values(), ids=STITCHED)
@pytest.mark.parametrize("reducer", [ToMe(r=4), EViT(keep=0.7, layers=(0, 1))], ids=["ToMe", "EViT"])
def test_the_tower_can_reduce_in_its_layers(case: Case, model: Any, reducer: Any) -> None:
    picture = case.pictures[0]
    tower, special = model.model.vision_tower, int(case is not STITCHED["LLaVA-OneVision"])
    inputs = case.inputs([5, picture, 6, 7])
    if "cls" in reducer.needs and not special:
        with pytest.raises(ValueError, match="EViT needs a class token, of which SiglipVisionModel has none"):
            apply(model, reducer)
        return
    layer = model.config.vision_feature_layer
    pixels = inputs["pixel_values"].flatten(0, -4)
    with apply(tower, reducer) as handle, torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states
        left = model.model.multi_modal_projector(states[layer][:, special:])
        maps = handle._work.composed(len(tower.encoder.layers) + 1 + layer).dense()[:, special:, special:]
    first = maps.argmax(-1)  # where each token stands: its first member, or the one that counts most
    order = case.order(picture)
    at = torch.stack([(order == crop * vlm.N + i).nonzero()[0, 0] for crop, row in enumerate(first) for i in row])
    is_newline = case.kept(picture, torch.zeros(case.crops(picture), dtype=torch.bool))
    at = (~is_newline).nonzero()[:, 0][at]
    places, which = torch.cat([at, is_newline.nonzero()[:, 0]]).sort(stable=True)
    newline = getattr(model.model, "image_newline", torch.zeros(32))
    rows = torch.cat([left.flatten(0, 1), newline.expand(int(is_newline.sum()), -1)])[which].detach()
    embed = model.get_input_embeddings()
    embeds = torch.cat([embed(torch.tensor([5])), rows, embed(torch.tensor([6, 7]))])[None].detach()
    expected = vlm.hand_logits(model, embeds)
    with apply(model, reducer) as handle:
        torch.testing.assert_close(logits(model, inputs), expected)
        new = generate(model, inputs)
        assert handle.stats.tokens_out == [len(places)]
        assert handle.stats.seconds > 0
        assert torch.equal(generate(model, inputs, num_beams=2)[:, :-NEW], new[:, :-NEW])
    with apply(model, reducer, place="layers") as handle:
        assert torch.equal(generate(model, inputs), new)
    assert handle.token_map[0].n_in == vlm.N


def test_places() -> None:
    case = vlm.MODELS["LLaVA-OneVision, video"]
    model = case.make()
    with apply(model, ToMe(r=2)), pytest.raises(NotImplementedError, match="place='layers': required, tokens that are"):
        logits(model, case.inputs([5, case.pictures[0]]))
    with pytest.raises(NotImplementedError, match="ToMe in the layers of Qwen2VLModel's vision tower: required"):
        apply(vlm.qwen2(), ToMe(r=2))
    with pytest.raises(ValueError, match="place must be 'layers' or 'output', got 'behind'"):
        apply(model, ToMe(r=2), place="behind")
    with pytest.raises(TypeError, match="where is place='layers' or 'output'; got layer"):
        apply(model, ToMe(r=2), layer=2)
    with pytest.raises(TypeError, match=r"supported are timm.*LlavaForConditionalGeneration.*Qwen2_5_VLForCond"):
        apply(nn.Linear(2, 2), ToMe(r=2))
    two = nn.ModuleList([model, vlm.llava()])
    with pytest.raises(ValueError, match=r"ModuleList contains several encoders, give apply one of them: 0\.model"):
        apply(two, ToMe(r=2))


@over_models
def test_half_precision(case: Case, model: Any) -> None:
    half = copy.deepcopy(model).to(torch.bfloat16)
    inputs = case.inputs([5, case.pictures[0], 6, 7], [9, 3, case.pictures[1]])
    inputs = {name: x.bfloat16() if x.is_floating_point() else x for name, x in inputs.items()}
    expected = logits(half, inputs)
    with apply(half, Every(1, ("cls", "column", "keys"))):
        assert torch.equal(logits(half, inputs), expected)
    with apply(half, Ragged()) as handle:
        new = generate(half, inputs)
        assert new.shape[1] == inputs["input_ids"].shape[1] + NEW
        assert sum(handle.stats.tokens_out) < sum(handle.stats.tokens_in)


def test_a_tower_that_packs_images_of_different_sizes() -> None:
    vision = transformers.PixtralVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=24, patch_size=4
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=vlm.llama(), image_token_index=vlm.IMAGE,
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config).eval()
    sizes = torch.tensor([[24, 16], [12, 24]])
    counts = [24, 18]
    row = [5, *[vlm.IMAGE] * 24, 6, *[vlm.IMAGE] * 18, 7]
    inputs = {"input_ids": torch.tensor([row]), "pixel_values": torch.randn(2, 3, 24, 24), "image_sizes": sizes}
    expected = logits(model, inputs)
    everything, some = Every(1), Every(3)
    with apply(model, everything):
        assert torch.equal(logits(model, inputs), expected)
    assert [ctx.grid for ctx in everything.seen] == [(1, 6, 4), (1, 3, 6)]
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"], image_sizes=sizes).pooler_output
        embed = model.get_input_embeddings()
        parts = [embed(torch.tensor([i])) for i in (5, 6, 7)]
        embeds = torch.cat([parts[0], features[0][::3], parts[1], features[1][::3], parts[2]])[None]
    with apply(model, some) as handle:
        torch.testing.assert_close(logits(model, inputs), vlm.hand_logits(model, embeds))
    assert handle.stats.tokens_in == counts
    with pytest.raises(NotImplementedError, match="required, column of the vision tower; supported, CLIPVisionModel"):
        apply(model, Every(2, ("column",)))
