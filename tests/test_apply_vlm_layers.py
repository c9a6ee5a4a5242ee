"""FlowCut in the layers of Qwen's vision towers, against towers written out patch by patch with masks for attention."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
import vlm_cases as vlm  # noqa: E402
from fastok import SoftMap, TokenMap, apply  # noqa: E402
from fastok.reducers import EViT, FlowCut, TokenContext, ToMe  # noqa: E402
from vlm_cases import Case, Every, Pairs, Picture, Prompt  # noqa: E402

DEPTH = 8
A, B, VIDEO = Picture(1, (48, 40)), Picture(2, (24, 56)), Picture(3, (32, 24), frames=3)
PROMPTS = ([5, A, 6, B, 7], [8, VIDEO, 4])


def deep(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """With enough layers for cuts of several sizes, whose attention has peaks."""

    def made() -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(vlm.QWEN, "depth", DEPTH)
            model: Any = make()
        torch.manual_seed(0)
        with torch.no_grad():
            for block in model.model.visual.blocks:
                for parameter in block.parameters():
                    if parameter.dim() > 1:
                        parameter.copy_(torch.randn_like(parameter) * 1.5 * parameter.shape[-1] ** -0.5)
                block.attn.qkv.bias[:32] = 8 * torch.randn(32)  # or the mean query would attend evenly
        model.lm_head.weight.data[vlm.VIDEO :] = 0  # so as not to say placeholders
        return model

    return made


CASES = {
    "Qwen2-VL": vlm.qwen_case(deep(vlm.qwen2), (A, B, VIDEO)),
    "Qwen2.5-VL": vlm.qwen_case(deep(lambda: vlm.qwen25((1, 4, 7))), (A, B, VIDEO)),
    "Qwen2.5-VL, windows": vlm.qwen_case(deep(lambda: vlm.qwen25(())), (A, B, VIDEO)),
}
over_cases = pytest.mark.parametrize("name", CASES)


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {}


@pytest.fixture
def case(name: str) -> Case:
    return CASES[name]


@pytest.fixture
def model(name: str, case: Case, models: dict[str, nn.Module]) -> Any:
    if name not in models:
        models[name] = case.make()
    return models[name]


def logits(model: Any, inputs: dict[str, Any], **more: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs, **more).logits


# ---- by hand ---------------------------------------------------------------------------------------------------------


def rotated(x: Tensor, at: Tensor) -> Tensor:
    """``x[P,H,D]`` turned by the row and column ``at[P,2]`` of each patch."""
    width = x.shape[-1]
    pace = 10000.0 ** -(torch.arange(0, width // 2, 2) / (width // 2))
    angle = (at[:, :, None] * pace).flatten(1).repeat(1, 2)[:, None]
    first, second = x.chunk(2, -1)
    return x * angle.cos() + torch.cat([-second, first], -1) * angle.sin()


def step(row: Tensor, norm: Tensor, before: Tensor | None, target: int, layer: int) -> tuple[list[int], Tensor]:
    """The published step for one image of ``[n]`` tokens: those that stay, and all scores so far."""
    share = row / row.sum()
    score = share * norm if before is None else 0.5 * before + 0.5 * share * norm
    n, left = len(row), DEPTH - 3 - layer
    if left % 2:
        return list(range(n)), score
    entropy = -(share * share.log()).sum() / math.log(n)
    cut = n if left == 0 else round((n - target) / math.sqrt(left) * float(1 - entropy**2))
    return sorted(score.argsort(descending=True, stable=True)[: max(n - cut, target)].tolist()), score


@torch.no_grad()
def tower_by_hand(model: Any, picture: Picture, keep: int) -> tuple[Tensor, list[int], list[int]]:
    """The tokens ``[m,C]`` that the merger makes of an image alone, their numbers in raster order, and how many were
    left after each layer."""
    tower, (t, h, w) = model.model.visual, vlm.qwen_grid(picture)
    pixels = next(iter(vlm.qwen_pixels([[picture]]).values()))
    x = pixels @ tower.patch_embed.proj.weight.flatten(1).T
    tokens = [(f, i, j) for f in range(t) for i in range(h // 2) for j in range(w // 2)]
    patches = [(f, i, j, 2 * i + y, 2 * j + z) for f, i, j in tokens for y in (0, 1) for z in (0, 1)]
    place, number = torch.tensor(patches), torch.arange(len(tokens))
    windows, full = hasattr(tower, "fullatt_block_indexes"), getattr(tower, "fullatt_block_indexes", ())
    before, lengths = None, []
    for layer, block in enumerate(tower.blocks):
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 4, 8)).unbind(1)
        q, k = rotated(q, place[:, 3:]), rotated(k, place[:, 3:])
        frame = place[:, :1]
        seen = torch.cat([frame, place[:, 1:3] // 2], 1) if windows and layer not in full else frame
        apart = (seen[:, None] != seen).any(-1)
        p = (torch.einsum("qhd,khd->hqk", q, k) * 8**-0.5).masked_fill(apart, -math.inf).softmax(-1)
        x = x + block.attn.proj(torch.einsum("hqk,khd->qhd", p, v).flatten(1))
        if layer < DEPTH - 2 and len(number) > keep:
            row = torch.zeros(len(x))
            for f in frame.unique():
                here = frame[:, 0] == f  # the mean query of a frame, over the frame, in every layer
                mean = torch.einsum("hd,khd->hk", q[here].mean(0), k[here]) * 8**-0.5
                row[here] = mean.softmax(-1).mean(0)
            norm = v.unflatten(0, (-1, 4)).mean((1, 2)).abs().sum(-1)
            stay, score = step(row.view(-1, 4).mean(1), norm, before, keep, layer)
            x, place = (y.unflatten(0, (-1, 4))[stay].flatten(0, 1) for y in (x, place))
            number, before = number[stay], score[stay]
        x = x + block.mlp(block.norm2(x))
        lengths.append(len(number))
    merged = tower.merger.mlp(tower.merger.ln_q(x).view(len(number), -1))
    return merged, number.tolist(), lengths


def expected(case: Case, model: Any, prompt: Prompt, keep: int, said: list[int]) -> tuple[Tensor, list[list[int]]]:
    """Logits of a prompt and what was said to it, and the tokens left of each of its images."""
    kept: list[list[int]] = []

    def left(picture: Picture, features: Tensor) -> tuple[Tensor, Tensor]:
        tokens, numbers, _ = tower_by_hand(model, picture, keep)
        kept.append(numbers)
        return tokens, torch.tensor(numbers)

    embeds, columns = vlm.by_hand(case, model, [*prompt, *said], left)
    inputs = case.inputs([*prompt, *said])
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
    positions, _ = model.model.get_rope_index(**{name: inputs.get(name) for name in names})
    return vlm.hand_logits(model, embeds, positions[..., columns]), kept


# ---- what it computes ------------------------------------------------------------------------------------------------


@over_cases
@pytest.mark.parametrize("keep", [6, 2])  # of a video of three frames, at least one frame has nothing left
def test_the_tower_is_that_written_out(case: Case, model: Any, keep: int) -> None:
    inputs, new = case.inputs(*PROMPTS), 4
    with apply(model, FlowCut(keep)) as handle:
        together = logits(model, inputs)
        maps, patches, stats = handle.token_map, handle.patches, handle.stats
        said = model.generate(**inputs, max_new_tokens=new, do_sample=False)[:, -new:].tolist()
        for batch in (inputs, case.inputs(*PROMPTS, side="right")):
            logits(model, batch)
            assert [x.assign.tolist() for x in handle.token_map] == [x.assign.tolist() for x in maps]
    assert stats.tokens_in == [30, 21, 36]
    assert stats.tokens_out == [keep] * 3
    assert stats.prompts == [(54, 3 + 2 * keep), (38, 2 + keep)]
    assert stats.seconds > 0
    at = 0
    for row, (prompt, words) in enumerate(zip(PROMPTS, said, strict=True)):
        by_hand, kept = expected(case, model, prompt, keep, words)
        length = stats.prompts[row][1]
        torch.testing.assert_close(together[row, -length:], by_hand[0, :length], atol=1e-4, rtol=1e-4)
        assert by_hand[0, length - 1 : -1].argmax(-1).tolist() == words
        for picture, numbers in zip((x for x in prompt if isinstance(x, Picture)), kept, strict=True):
            assert maps[at].representative.tolist() == [numbers]
            t, h, w = vlm.qwen_grid(picture)
            slots = torch.full((t * h * w // 4,), -1)
            slots[numbers] = torch.arange(keep)
            assert torch.equal(torch.stack(patches[at]), slots.view(t, h // 2, w // 2))
            at += 1
    lengths = [tower_by_hand(model, x, keep)[2] for x in (A, B, VIDEO)]
    assert all(len(set(x)) > 2 for x in lengths)  # the schedule has cut in several layers
    if keep == 2:
        assert any(bool((x < 0).all()) for x in patches[2])


@over_cases
def test_images_do_not_depend_on_each_other(case: Case, model: Any) -> None:
    """Neither on how many there are nor on how short the others become, though they run through the tower as one."""
    prompts = ([5, A, 6, B, 7, A], [9, B, 3], [4, 4])
    inputs = case.inputs(*prompts)
    with apply(model, FlowCut(0.3)) as handle:
        logits(model, inputs)
        maps = [x.keep_mask[0].tolist() for x in handle.token_map]
        assert handle.stats.tokens_out == [9, 6, 9, 6]
        together = model.generate(**inputs, max_new_tokens=3, do_sample=False)[:, -3:].tolist()
        beams = model.generate(**inputs, max_new_tokens=3, do_sample=False, num_beams=2)[:, -3:].tolist()
        alone = []
        for prompt, words, searched in zip(prompts, together, beams, strict=True):
            own = case.inputs(prompt)
            logits(model, own)
            alone += [x.keep_mask[0].tolist() for x in handle.token_map] if len(prompt) > 2 else []
            assert model.generate(**own, max_new_tokens=3, do_sample=False)[0, -3:].tolist() == words
            search = model.generate(**own, max_new_tokens=3, do_sample=False, num_beams=2)
            assert search[0, -3:].tolist() == searched
    assert maps == alone


@over_cases
@pytest.mark.parametrize("attention", ["eager", "fastok", "flash"])
def test_other_attention_functions(case: Case, model: Any, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those named after FlashAttention are given all sequences at once, by their cumulative lengths."""
    packed = vlm.with_flash(monkeypatch)
    inputs = case.inputs(*PROMPTS)
    with apply(model, FlowCut(2)) as handle:
        plain = logits(model, inputs)
        kept = [x.assign.tolist() for x in handle.token_map]
    changed = copy.deepcopy(model)
    changed.model.visual.config._attn_implementation = attention
    with apply(changed, FlowCut(2)) as handle:
        torch.testing.assert_close(logits(changed, inputs), plain, atol=1e-4, rtol=1e-4)
        assert [x.assign.tolist() for x in handle.token_map] == kept
    assert [x[-1] for x in packed[DEPTH - 2 : DEPTH]] == ([16, 16] if attention == "flash" else [])


@over_cases
def test_nothing_changes_where_nothing_is_dropped_or_the_handle_is_left(case: Case, model: Any) -> None:
    inputs, kinds = case.inputs(*PROMPTS), [type(x) for x in model.modules()]
    plain = logits(model, inputs)
    with apply(model, FlowCut(36)) as handle:
        assert torch.equal(logits(model, inputs), plain)
        assert handle.stats.tokens_out == handle.stats.tokens_in
    with apply(model, FlowCut(4)):
        assert not torch.equal(logits(model, inputs)[:, -1], plain[:, -1])
    assert torch.equal(logits(model, inputs), plain)
    assert [type(x) for x in model.modules()] == kinds
    assert all("_fastok" not in vars(x) for x in model.modules())


@over_cases
def test_the_features_of_images_are_zero_where_tokens_are_gone(case: Case, model: Any) -> None:
    pixels = case.pixels([[A, B]])
    with apply(model, FlowCut(5)), torch.no_grad():
        features = model.get_image_features(**pixels, return_dict=True).pooler_output
        for picture, x in zip((A, B), features, strict=True):
            tokens, numbers, _ = tower_by_hand(model, picture, 5)
            torch.testing.assert_close(x[numbers], tokens, atol=1e-4, rtol=1e-4)
            assert x.abs().sum(1).nonzero()[:, 0].tolist() == numbers


@over_cases
def test_half_precision(case: Case, model: Any) -> None:
    half = copy.deepcopy(model).to(torch.bfloat16)
    inputs = {key: x.bfloat16() if x.is_floating_point() else x for key, x in case.inputs(*PROMPTS).items()}
    with apply(half, FlowCut(6)) as handle:
        assert logits(half, inputs).isfinite().all()
        assert handle.stats.tokens_out == [6, 6, 6]


# ---- training, copies, graphs ----------------------------------------------------------------------------------------


@over_cases
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_also_with_checkpoints_and_several_forwards(case: Case, reentrant: bool) -> None:
    model: Any = case.make()
    batches = [case.inputs([5, A, 6, 7]), case.inputs([5, B, 6, 7])]
    for inputs in batches:
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == vlm.IMAGE, -100)
    grads, runs = [], []
    model.model.visual.blocks[3].norm1.register_forward_pre_hook(lambda m, args: runs.append(len(args[0])))
    with apply(model, FlowCut(5)):
        for checkpoints in (False, True):
            if checkpoints:
                model.model.visual.train()
                model.model.visual.gradient_checkpointing_enable({"use_reentrant": reentrant})
                # What is recomputed needs an input with a gradient where checkpoints are reentrant.
                model.model.visual.patch_embed.register_forward_hook(lambda m, args, out: out.requires_grad_())
            model.zero_grad()
            losses = [model(**inputs).loss for inputs in batches]
            sum(losses).backward()
            grads.append([p.grad.clone() for p in model.model.visual.blocks.parameters()])
    assert len(runs) == 2 + 4
    assert sorted(runs[2:]) == sorted(2 * runs[:2])  # each layer has found the tokens of its own forward again
    assert runs[0] != runs[1]
    for plain, again in zip(*grads, strict=True):
        assert plain.abs().sum() > 0
        torch.testing.assert_close(again, plain, atol=1e-6, rtol=1e-4)


def test_a_dropped_token_gets_a_gradient_through_those_that_saw_it() -> None:
    case = CASES["Qwen2-VL"]
    model = case.make()
    inputs = case.inputs([5, A, 6])
    inputs["pixel_values"].requires_grad_()
    with apply(model, FlowCut(5)) as handle:
        model(**inputs).logits.sum().backward()
    grad = inputs["pixel_values"].grad.unflatten(0, (-1, 4)).abs().sum((1, 2))
    assert len(handle.token_map[0].keep_mask[0]) == len(grad)
    assert (grad > 0).all()


def test_a_copy_of_a_reduced_model_reduces_for_itself() -> None:
    case = CASES["Qwen2.5-VL"]
    model = case.make()
    inputs = case.inputs([5, A, 6])
    with apply(model, FlowCut(5)) as handle:
        expected = logits(model, inputs)
        twin = copy.deepcopy(model.model.visual)
        kept = handle.token_map[0]
        with torch.no_grad():
            other = twin(case.pixels([[B]])["pixel_values"], grid_thw=torch.tensor([vlm.qwen_grid(B)]))
        assert (other.pooler_output.abs().sum(1) > 0).sum() == 5
        assert torch.equal(handle.token_map[0].assign, kept.assign)
        assert torch.equal(logits(model, inputs), expected)


@over_cases
def test_compiled_it_breaks_the_graph_and_is_right(case: Case, model: Any) -> None:
    inputs = case.inputs([5, A, 6, 7])
    torch.compiler.reset()
    with apply(model, FlowCut(5)), torch.no_grad():
        plain = model(**inputs).logits
        torch.testing.assert_close(torch.compile(model, backend="eager")(**inputs).logits, plain, atol=1e-5, rtol=1e-4)
        torch.compiler.reset()
        reasons = [str(x.reason) for x in torch._dynamo.explain(model)(**inputs).break_reasons]
        assert any("how many tokens the layers leave of each image is read on the host" in x for x in reasons)
    torch.compiler.reset()


# ---- other reducers --------------------------------------------------------------------------------------------------


class Turning:
    """Drops the last token that it is shown and turns the others round, in every layer; numbers go along."""

    needs = ("hidden",)

    def __init__(self) -> None:
        self.seen: list[TokenContext] = []

    def __call__(self, ctx: TokenContext) -> TokenMap:
        self.seen.append(ctx)
        n = ctx.hidden.shape[1]
        before = ctx.extra.get("Turning")
        ctx.extra["Turning"] = torch.arange(n)[None] if before is None else before
        return TokenMap.keep(torch.arange(n - 1).flip(0)[None], n)


@over_cases
def test_a_reducer_of_ones_own_in_its_own_order(case: Case, model: Any) -> None:
    reducer, order = Turning(), list(range(21))
    entered: dict[int, Tensor] = {}
    inner = model.model.visual.blocks[0]
    hook = inner.norm2.register_forward_pre_hook(lambda m, args: entered.update({0: args[0]}))
    with apply(model, reducer, place="layers") as handle:
        logits(model, case.inputs([5, B, 6]))
        for layer, ctx in enumerate(reducer.seen):
            assert (ctx.layer, ctx.n_layers, ctx.n_tokens) == (layer, DEPTH, 21)
            assert ctx.hidden.shape == (1, len(order), 32)
            assert ctx.extra["Turning"].tolist() == [order]
            order = order[-2::-1]
        assert handle.token_map[0].representative.tolist() == [order]
        assert sorted(set(range(21)) - set(order)) == [0, 1, 2, 3, 17, 18, 19, 20]
    hook.remove()
    # The first context is what enters the first MLP, in the tower's order and without the last token.
    shown = reducer.seen[0].hidden[0, :-1]
    torch.testing.assert_close(entered[0].unflatten(0, (-1, 4)).mean(1).sort(0).values, shown.sort(0).values)


class Masked(Every):
    """As `Every`, with a map that has room for all tokens."""

    def __call__(self, ctx: TokenContext) -> TokenMap:
        n = ctx.hidden.shape[1]
        kept = torch.arange(n) % self.step == 0
        assign = torch.where(kept, kept.cumsum(0) - 1, -1)[None]
        return TokenMap.from_assign(assign, n, kept.sum()[None])


@over_cases
def test_maps_with_room_to_spare(case: Case, model: Any) -> None:
    inputs = case.inputs(*PROMPTS)
    found = []
    for reducer in (Every(2), Masked(2)):
        with apply(model, reducer, place="layers") as handle:
            found.append((logits(model, inputs), [x.assign.tolist() for x in handle.token_map]))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_what_these_layers_do_not_do() -> None:
    case = CASES["Qwen2.5-VL"]
    model = case.make()
    inputs = case.inputs([5, A, 6])
    message = "in the layers of Qwen2_5_VLModel's vision tower: required, {}; supported, methods that .*missing, {};"
    for reducer, missing in (
        (ToMe(r=2), ("keys", "keys")),
        (EViT(), ("cls", "cls")),
        (Every(2, ("column", "hidden")), ("column, hidden", "column")),
    ):
        with pytest.raises(NotImplementedError, match=message.format(*missing)):
            apply(model, reducer, place="layers")
        assert all("_fastok" not in vars(module) for module in model.modules())

    class Summed(Every):
        mean_query = True

        def score_layers(self, n_layers: int) -> dict[str, tuple[int, ...]]:
            return {"cls": (0, 1)}

    with pytest.raises(NotImplementedError, match=message.format("cls", "cls")):
        apply(model, Summed(2, ("cls",)), place="layers")

    class Wrong(Every):
        def __call__(self, ctx: TokenContext) -> Any:
            n = ctx.hidden.shape[1]
            nothing = TokenMap.keep(torch.empty(1, 0, dtype=torch.int64), n)
            return [None, SoftMap.from_dense(torch.eye(n)[None]), TokenMap.identity(1, n + 1), nothing][self.step]

    for reducer, error, words in (
        (Pairs(), NotImplementedError, "required, 30 tokens merged into 15; supported, tokens that are kept"),
        (Wrong(1), NotImplementedError, "required, a SoftMap; supported, a TokenMap that drops tokens"),
        (Wrong(2), ValueError, "Wrong must return a map of 1 sample from 30 tokens, got 1 samples from 31"),
        (Wrong(0), TypeError, "Wrong must return a TokenMap, got NoneType"),
        (Wrong(3), ValueError, "Wrong must keep a token of each image, got a map that drops all 30"),
    ):
        with apply(model, reducer, place="layers"), pytest.raises(error, match=words):
            logits(model, inputs)
    assert logits(model, inputs).isfinite().all()
