"""What a reducer between vision tower and language model is shown, against the tower's eager attention."""

import copy
import math
import sys
from typing import Any

import pytest
import torch
from fastok.reducers import FlowCut, TokenContext
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers")
import vlm_cases as vlm  # noqa: E402
from fastok import TokenMap, apply  # noqa: E402
from vlm_cases import Case, Every, Picture  # noqa: E402

LLAVA = {name: case for name, case in vlm.MODELS.items() if name.startswith("LLaVA")}
over_llava = pytest.mark.parametrize("case", LLAVA.values(), ids=LLAVA)


class Deep(Every):
    """Wants scores of other layers, too."""

    def score_layers(self, n_layers: int) -> dict[str, tuple[int, ...]]:
        return {"column:early": (0,), "cls:sum": (0, -1)}


NEEDS = ("cls", "column", "cls:logit", "column:early", "cls:sum", "keys", "values", "vision", "vision_cls", "text")


class Ops(TorchDispatchMode):
    """Counts calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(str(func))
        return func(*args, **kwargs or {})


def seen(model: Any, inputs: dict[str, Any], reducer: Any) -> list[TokenContext]:
    with apply(model, reducer), torch.no_grad():
        model(**inputs)
    return reducer.seen


def pooled(case: Case, model: Any, x: Tensor) -> Tensor:
    """``[crops,N,C]`` as the model pools a video's features."""
    if not case.pictures[0].frames:
        return x
    image = x.unflatten(1, (vlm.SIDE, vlm.SIDE)).permute(0, 3, 1, 2)
    half = math.ceil(vlm.SIDE / 2)
    return nn.functional.interpolate(image, size=(half, half), mode="bilinear").flatten(2).mT


@over_llava
def test_contexts_show_what_the_tower_attends_to(case: Case) -> None:
    model = case.make()
    a, b, _ = case.pictures
    inputs = case.inputs([5, a, 6, 7], [8, b])
    has_class = "CLIP" in type(model.model.vision_tower).__name__
    reducer = Deep(1, tuple(name for name in NEEDS if has_class or name != "vision_cls"))
    contexts = seen(model, inputs, reducer)
    tower, config = model.model.vision_tower, model.config
    tower.set_attn_implementation("eager")
    feature = tower.config.num_hidden_layers + config.vision_feature_layer  # the layer that makes it
    skip = int(has_class)
    for picture, text, ctx in zip((a, b), ([5, 6, 7], [8]), contexts, strict=True):
        pixels = case.pixels([[picture]])
        pixels = pixels.get("pixel_values_videos", pixels.get("pixel_values")).flatten(0, -4)
        with torch.no_grad():
            out = tower(pixels, output_attentions=True, output_hidden_states=True)
        crops = case.crops(picture)
        valid = torch.zeros(crops[0] * crops[1], dtype=torch.bool).index_fill(0, case.order(picture), True).view(crops)
        resampled = case is LLAVA["LLaVA-OneVision, resampled"]
        if resampled:
            valid[1:] = False  # those are mixtures

        def same(got: Tensor, expected: Tensor, valid: Tensor = valid) -> None:
            assert got.shape[:2] == valid.shape
            torch.testing.assert_close(got[valid], expected[valid], atol=1e-5, rtol=1e-4)

        def column(layer: int, skip: int = skip, out: Any = out) -> Tensor:
            return pooled(case, model, out.attentions[layer].mean((1, 2))[:, skip:, None])[..., 0]

        def row(layer: int, column: Any = column, out: Any = out) -> Tensor:
            return out.attentions[layer].mean(1)[:, 0, 1:] if has_class else column(layer)

        same(ctx.scores["column"], column(feature))
        if resampled:
            whole = torch.tensor(vlm.stitched(picture))
            image = column(feature)[whole[..., 0], whole[..., 1]]
            small = vlm.stitched(picture, 2)
            image = nn.functional.interpolate(image[None, None], (len(small), len(small[0])), mode="bilinear")[0, 0]
            at = torch.tensor(small)
            torch.testing.assert_close(ctx.scores["column"][at[..., 0], at[..., 1]], image, atol=1e-5, rtol=1e-4)
        same(ctx.scores["cls"], row(feature))
        same(ctx.scores["column:early"], column(0))
        same(ctx.scores["cls:sum"], row(0) + row(-1))
        attention = tower.encoder.layers[feature].self_attn
        with torch.no_grad():
            x = tower.encoder.layers[feature].layer_norm1(out.hidden_states[feature])
            q, k, v = (f(x).unflatten(-1, (4, 8)) for f in (attention.q_proj, attention.k_proj, attention.v_proj))
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * 8**-0.5
        logits = logits.mean(1)[:, 0, 1:] if has_class else pooled(case, model, logits.mean((1, 2))[..., None])[..., 0]
        same(ctx.scores["cls:logit"], logits)
        same(ctx.keys.flatten(2), pooled(case, model, k[:, skip:].flatten(2)))
        same(ctx.values.flatten(2), pooled(case, model, v[:, skip:].flatten(2)))
        vision = out.hidden_states[config.vision_feature_layer]
        same(ctx.extra["vision"], pooled(case, model, vision[:, skip:]))
        if has_class:
            torch.testing.assert_close(ctx.extra["vision_cls"], vision[:, 0])
        assert ctx.hidden.shape[:2] == case.crops(picture)
        assert ctx.grid == (1, *[math.isqrt(case.crops(picture)[1])] * 2)
        assert ctx.protect == 0
        torch.testing.assert_close(ctx.text, model.get_input_embeddings()(torch.tensor([text])))


def test_only_the_layers_asked_for_are_observed_and_none_is_eager() -> None:
    model = vlm.llava()
    inputs = vlm.LLAVA.inputs([5, Picture(1), 6])
    counts = {}
    for name, reducer in {
        "nothing": Every(2),
        "row": Every(2, ("cls",)),
        "two": Deep(2, ("cls", "cls:sum")),
        "keys": Every(2, ("keys",)),
    }.items():
        with apply(model, reducer), Ops() as ops, torch.no_grad():
            model(**inputs)
        counts[name] = sum("fastok.attention_scores" in call for call in ops.calls)
    assert counts == {"nothing": 0, "row": 1, "two": 3, "keys": 0}


class Whole(Every):
    """Sees all crops at once."""

    whole_image = True


@over_llava
def test_a_reducer_of_whole_images(case: Case) -> None:
    torch.manual_seed(0)
    model, picture = case.make(), case.pictures[0]
    crops, n = case.crops(picture)
    reducer = Whole(5, ("column", "keys", "vision", "valid", "crops"))
    (ctx,) = seen(model, case.inputs([5, picture, 6]), reducer)
    assert ctx.hidden.shape[:2] == ctx.keys.shape[:2] == ctx.scores["column"].shape == (1, crops * n)
    assert ctx.extra["vision"].shape[:2] == ctx.extra["valid"].shape == (1, crops * n)
    assert ctx.grid is None
    rows, columns = ctx.extra["crops"].tolist()
    assert rows * columns + 1 == crops or (rows, columns) == (0, 0)
    order = case.order(picture)
    valid = torch.zeros(crops * n, dtype=torch.bool).index_fill(0, order, True)
    assert torch.equal(ctx.extra["valid"][0], valid)
    kept = torch.arange(crops * n) % 5 == 0
    prompt = [5, picture, 6]

    def left(picture: Picture, features: Tensor) -> tuple[Tensor, Tensor]:
        places = case.kept(picture, kept.view(crops, n)).nonzero()[:, 0]
        return features[places], places

    embeds, _ = vlm.by_hand(case, model, prompt, left)
    with apply(model, Whole(5)), torch.no_grad():
        assert torch.equal(model(**case.inputs(prompt)).logits, vlm.hand_logits(model, embeds))


class First(Every):
    """Keeps the first tokens of each crop."""

    def __call__(self, ctx: TokenContext) -> TokenMap:
        batch, n = ctx.hidden.shape[:2]
        return TokenMap.keep(torch.arange(self.step).repeat(batch, 1), n)


@pytest.mark.parametrize("case", list(LLAVA.values())[1:], ids=list(LLAVA)[1:])
def test_newlines_stay_as_the_reducer_says(case: Case) -> None:
    model, picture = case.make(), case.pictures[0]
    crops, n = case.crops(picture)
    newlines = int(case.kept(picture, torch.zeros(crops, n, dtype=torch.bool)).sum())
    kept = case.kept(picture, (torch.arange(n) < 2).repeat(crops, 1))
    with torch.no_grad():
        for rule, expected in (("all", int(kept.sum())), ("none", int(kept.sum()) - newlines), ("filled", None)):
            reducer = First(2)
            reducer.newlines = rule
            with apply(model, reducer) as handle:
                model(**case.inputs([5, picture, 6]))
            count = handle.stats.tokens_out[0]
            if expected is None:
                # Rows with something in them: the first of each row of crops.
                token = torch.full((len(kept),), -1)
                token[~case.kept(picture, torch.zeros(crops, n, dtype=torch.bool))] = case.order(picture)
                lines, filled, together = 0, False, case.together(picture) * n
                for place in range(len(kept)):
                    if token[place] < 0:
                        lines, filled = lines + filled, False
                    else:
                        filled |= bool(kept[place]) and (place >= together or together == crops * n)
                expected = int(kept.sum()) - newlines + lines
            assert count == expected
        reducer.newlines = "some"
        with apply(model, reducer), pytest.raises(ValueError, match="newlines must be one of 'all', 'filled', 'none'"):
            model(**case.inputs([5, picture, 6]))


def test_towers_that_cannot_show_it_and_those_that_need_not() -> None:
    model = vlm.llava(vision_feature_select_strategy="full", vision_feature_layer=-1)
    with pytest.raises(NotImplementedError, match="Every in LlavaModel: required, cls of the vision tower; supported"):
        apply(model, Every(2, ("cls",)))
    assert all("_fastok" not in vars(module) for module in model.modules())
    ids = torch.tensor([[5, *[vlm.IMAGE] * 37, 6]])
    with apply(model, Every(2)) as handle, torch.no_grad():
        model(input_ids=ids, **vlm.llava_pixels([[Picture(1)]]))
        assert handle.stats.tokens_out == [19]
        with pytest.raises(NotImplementedError, match="vision_feature_select_strategy: required, 'default'"):
            model(input_ids=ids, **vlm.llava_pixels([[Picture(1)]]), vision_feature_select_strategy="default")


def test_an_image_is_drawn_from_its_map() -> None:
    pillow = pytest.importorskip("PIL.Image")
    from fastok import viz

    model = vlm.llava()
    with apply(model, Every(2)) as handle:
        with pytest.raises(RuntimeError, match="no prompt with images was seen since apply"):
            _ = handle.token_map
        with torch.no_grad():
            model(**vlm.LLAVA.inputs([5, Picture(1), 6]))
    drawn = viz.draw_tokens(pillow.new("RGB", (24, 24), "red"), handle.token_map[0], (vlm.SIDE, vlm.SIDE))
    assert drawn.width == drawn.height


QWEN: dict[str, Any] = {
    "Qwen2-VL": vlm.MODELS["Qwen2-VL"],
    "Qwen2.5-VL, windows": vlm.MODELS["Qwen2.5-VL"],
    "Qwen2.5-VL, full": vlm.qwen_case(lambda: vlm.qwen25((0, 2)), vlm.MIXED),
}


def window_order(case: Case, picture: Picture) -> list[int]:
    """The tokens of an image in the order in which the tower runs them, windows of 2 x 2 tokens one after the other."""
    t, h, w = vlm.qwen_grid(picture)
    rows, columns = h // 2, w // 2
    if case is QWEN["Qwen2-VL"]:
        return list(range(t * rows * columns))
    return [
        (frame * rows + y) * columns + x
        for frame in range(t)
        for top in range(0, rows, 2)
        for left in range(0, columns, 2)
        for y in range(top, min(top + 2, rows))
        for x in range(left, min(left + 2, columns))
    ]


@pytest.mark.parametrize("case", QWEN.values(), ids=QWEN)
def test_qwen_contexts_are_means_over_merged_patches(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model = case.make()
    pictures = (*vlm.MIXED[:2], vlm.MIXED[2])
    inputs = case.inputs([5, pictures[0], 6, 7], [8, pictures[1], 4, pictures[2]])
    reducer = Deep(1, tuple(name for name in NEEDS if name != "vision_cls"))
    contexts = seen(model, inputs, reducer)
    visual = model.model.visual
    visual.set_attn_implementation("eager")
    source = sys.modules[type(visual).__module__]
    plain, weights, logits = source.eager_attention_forward, [], []

    def spy(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer = next(i for i, block in enumerate(visual.blocks) if block.attn is module)
        out = plain(module, q, k, v, *args, **kwargs)
        weights.append((layer, out[1].mean((0, 1, 2))))
        logits.append((layer, (q @ k.mT * 8**-0.5).mean((0, 1, 2))))
        return out

    monkeypatch.setattr(source, "eager_attention_forward", spy)
    assert [len(ctx.hidden[0]) for ctx in contexts] == [case.tokens(p) for p in pictures]
    for picture, text, ctx in zip(pictures, ([5, 6, 7], [8, 4], [8, 4]), contexts, strict=True):
        weights.clear()
        logits.clear()
        pixels = list(case.pixels([[picture]]).values())
        inner: dict[int, Tensor] = {}
        hooks = [visual.blocks[-1].attn.qkv.register_forward_hook(lambda m, i, o, inner=inner: inner.update({0: o}))]
        with torch.no_grad():
            out = visual(pixels[0], grid_thw=pixels[1])
        for hook in hooks:
            hook.remove()
        order = torch.tensor(window_order(case, picture)).argsort()

        def tokens(x: Tensor, order: Tensor = order) -> Tensor:
            return x.unflatten(0, (-1, 4)).mean(1)[order][None]

        def of(found: list[tuple[int, Tensor]], layer: int, tokens: Any = tokens) -> Tensor:
            return tokens(torch.cat([x for i, x in found if i == layer]))

        close = {"atol": 1e-5, "rtol": 1e-4}
        torch.testing.assert_close(ctx.scores["column"], of(weights, 2), **close)
        torch.testing.assert_close(ctx.scores["cls"], of(weights, 2), **close)
        torch.testing.assert_close(ctx.scores["column:early"], of(weights, 0), **close)
        torch.testing.assert_close(ctx.scores["cls:sum"], of(weights, 0) + of(weights, 2), **close)
        torch.testing.assert_close(ctx.scores["cls:logit"], of(logits, 2), **close)
        qkv = inner[0].unflatten(-1, (3, 4, 8))
        torch.testing.assert_close(ctx.keys, tokens(qkv[:, 1]), **close)
        torch.testing.assert_close(ctx.values, tokens(qkv[:, 2]), **close)
        torch.testing.assert_close(ctx.extra["vision"], tokens(out.last_hidden_state), **close)
        torch.testing.assert_close(ctx.hidden[0], out.pooler_output, **close)
        t, h, w = vlm.qwen_grid(picture)
        assert ctx.grid == (t, h // 2, w // 2)
        torch.testing.assert_close(ctx.text, model.get_input_embeddings()(torch.tensor([text])))


def test_a_model_without_a_class_token_has_no_features_of_it() -> None:
    for make in (vlm.qwen2, vlm.onevision):
        with pytest.raises(NotImplementedError, match="Every: required, vision_cls; missing, a class token"):
            apply(make(), Every(2, ("vision_cls",)))


@pytest.mark.parametrize("case", QWEN.values(), ids=QWEN)
def test_survivors_keep_their_positions(case: Case) -> None:
    model, given = case.make(), {}
    a, b, c = vlm.MIXED
    inputs = case.inputs([5, a, 6, 7], [8, b, 4, c, 3])
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
    expected, deltas = model.model.get_rope_index(**{name: inputs[name] for name in names})
    hook = model.model.language_model.register_forward_pre_hook(lambda m, args, kw: given.update(kw), with_kwargs=True)
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
    unreduced = given["position_ids"]
    with apply(model, Every(2)), torch.no_grad():
        model(**inputs)
        at_once = given["position_ids"], given["attention_mask"]
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert torch.equal(given["position_ids"][-3:], unreduced[-3:])
    hook.remove()
    for row, prompt in enumerate(([5, a, 6, 7], [8, b, 4, c, 3])):
        columns, at = [], int((inputs["attention_mask"][row] == 0).sum())
        for part in prompt:
            count = 1 if isinstance(part, int) else case.tokens(part)
            columns += range(at, at + count, 2)
            at += count
        positions, visible = at_once[0][:, row], at_once[1][row].bool()
        assert torch.equal(positions[:, visible], expected[:, row, columns])
    assert torch.equal(model.model.rope_deltas, deltas)


class MeanQuery(Every):
    """Wants the mean query's row in place of a class token's."""

    mean_query = True


@pytest.mark.parametrize("case", QWEN.values(), ids=QWEN)
@pytest.mark.parametrize("attention", ["sdpa", "flash"])
def test_qwen_shows_the_mean_querys_row(case: Case, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each frame (or window) alone. FlashAttention is given all of them at once, packed."""
    model, picture = case.make(), vlm.MIXED[0]
    source = sys.modules[type(model.model.visual).__module__]
    rows: list[Tensor] = []
    plain = source.eager_attention_forward

    def spy(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        if module is model.model.visual.blocks[-1].attn:
            rows.append((q @ k.mT * 8**-0.5).mean(2).softmax(-1).mean((0, 1)))
        return plain(module, q, k, v, *args, **kwargs)

    inputs = case.inputs([5, picture, 6])
    ours = copy.deepcopy(model)
    packed = vlm.with_flash(monkeypatch)
    ours.model.visual.config._attn_implementation = attention
    (ctx,) = seen(ours, inputs, MeanQuery(1, ("cls",)))
    assert len(packed) == (len(ours.model.visual.blocks) if attention == "flash" else 0)
    model.model.visual.set_attn_implementation("eager")
    monkeypatch.setattr(source, "eager_attention_forward", spy)
    with torch.no_grad():
        model(**inputs)
    order = torch.tensor(window_order(case, picture)).argsort()
    expected = torch.cat(rows).unflatten(0, (-1, 4)).mean(1)[order][None]
    torch.testing.assert_close(ctx.scores["cls"], expected, atol=1e-6, rtol=1e-4)


def test_siglip_shows_the_mean_querys_row() -> None:
    case = vlm.MODELS["LLaVA-OneVision"]
    model, picture = case.make(), case.pictures[0]
    inputs = case.inputs([5, picture, 6])
    (ctx,) = seen(model, inputs, MeanQuery(1, ("cls",)))
    tower, layer = model.model.vision_tower, model.model.vision_tower.encoder.layers[-1]
    with torch.no_grad():
        states = tower(inputs["pixel_values"].flatten(0, -4), output_hidden_states=True).hidden_states
        x = layer.layer_norm1(states[-2])
        q, k = (f(x).unflatten(-1, (4, 8)) for f in (layer.self_attn.q_proj, layer.self_attn.k_proj))
        row = (torch.einsum("bhd,bkhd->bhk", q.mean(1), k) * 8**-0.5).softmax(-1).mean(1)
    torch.testing.assert_close(ctx.scores["cls"], row, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["Qwen2-VL", "Qwen2.5-VL", "LLaVA-OneVision", "LLaVA-OneVision, video"])
def test_flowcut_cuts_once_behind_a_tower(name: str) -> None:
    """By the mean query's row times the norm of the mean value, in every crop or frame that is encoded apart."""
    case = vlm.MODELS[name]
    model, picture = case.make(), case.pictures[0]
    inputs = case.inputs([5, picture, 6])
    (ctx,) = seen(model, inputs, MeanQuery(1, ("cls", "values")))
    score = ctx.scores["cls"] * ctx.values.mean(2).abs().sum(-1)
    with apply(model, FlowCut(4), place="output") as handle, torch.no_grad():
        model(**inputs)
    for row, kept in zip(score, handle.token_map[0].keep_mask, strict=True):
        assert kept.nonzero()[:, 0].tolist() == sorted(row.topk(4).indices.tolist())
