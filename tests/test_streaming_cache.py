"""``StreamingCache``: a recomputed stream, in constant memory, however it is cut."""

import gc
from functools import partial
from typing import Any

import pytest
import torch
from cache_cases import (
    LAYERS,
    D,
    G,
    H,
    assert_close,
    build,
    check_batches,
    check_room_for_everything_changes_nothing,
    check_sampling_and_conversation,
    ids,
    left_padding,
    run,
    turned,
)  # fmt: skip
from fastok.sparse import StreamingCache
from fastok.testing import assert_accurate, assert_same
from torch import Tensor

transformers = pytest.importorskip("transformers")

with_and_without_model = pytest.mark.parametrize("given", [True, False], ids=["model given", "model found"])


def streaming(model: Any, given: bool, sink: int = 3, recent: int = 9) -> StreamingCache:
    return StreamingCache(sink, recent, model if given else None)


def recomputed(model: Any, tokens: Tensor, sink: int, recent: int) -> Tensor:
    """Logits of one stream ``[T]``, each query over keys that are placed anew for it."""
    x = model.model.embed_tokens(tokens)
    lists = []
    for t in range(len(tokens)):
        begin = max(t + 1 - recent, 0)
        lists.append([*range(min(sink, begin)), *range(begin, t + 1)])
    newest = torch.tensor([len(one) - 1 for one in lists], dtype=x.dtype)
    seen = torch.tensor([one + [0] * (sink + recent - len(one)) for one in lists])
    there = torch.arange(sink + recent) <= newest[:, None]
    for layer in model.model.layers:
        states = layer.input_layernorm(x)
        q, k, v = (
            project(states).view(len(tokens), -1, D).transpose(0, 1)
            for project in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        )
        k, v = k.repeat_interleave(H // G, 0), v.repeat_interleave(H // G, 0)
        keys = turned(k[:, seen], torch.arange(sink + recent, dtype=x.dtype))  # [H,T,sink+recent,D]
        logits = (turned(q, newest)[:, :, None] @ keys.mT)[:, :, 0] * D**-0.5
        p = logits.masked_fill(~there, -torch.inf).softmax(-1)
        x = x + layer.self_attn.o_proj((p[:, :, None] @ v[:, seen])[:, :, 0].transpose(0, 1).flatten(1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(model.model.norm(x))


@with_and_without_model
@torch.no_grad()
def test_thousands_of_steps_equal_the_stream_recomputed(given: bool) -> None:
    model, tokens = build(num_hidden_layers=2), ids(1, 3000)
    cache, got, sizes = streaming(model, given), [], set()
    ends = [*range(1, 300), *range(300, 2950, 37), *range(2980, 3000)]
    for begin, end in zip([0, *ends], [*ends, 3000], strict=True):
        got.append(model(tokens[:, begin:end], past_key_values=cache).logits[0])
        sizes.add(cache.nbytes)
    assert len(sizes) == 1  # from the first token on
    wanted = recomputed(model, tokens[0], 3, 9)
    truth = recomputed(build("eager", num_hidden_layers=2).double(), tokens[0], 3, 9)
    assert_accurate(torch.cat(got), truth, wanted, factor=4)
    original = model(tokens).logits[0]
    assert (wanted[50:] - original[50:]).abs().max() > 0.01  # to see more, or at other places, would be found out


@with_and_without_model
@pytest.mark.parametrize("cuts", [(), (5, 6, 7), (40,), (1, 20, 30, 31, 55)])
@torch.no_grad()
def test_streams_may_be_cut_anywhere(given: bool, cuts: tuple[int, ...]) -> None:
    model, tokens = build(num_hidden_layers=2), ids(2, 60)
    got = run(model, streaming(model, given), tokens, cuts)
    truth = torch.stack([recomputed(build("eager", num_hidden_layers=2).double(), row, 3, 9) for row in tokens])
    wanted = torch.stack([recomputed(model, row, 3, 9) for row in tokens])
    assert_accurate(got, truth, wanted, factor=4)


@pytest.mark.parametrize(("sink", "recent"), [(0, 1), (0, 8), (1, 1), (5, 2), (4, 100)])
@torch.no_grad()
def test_other_sizes(sink: int, recent: int) -> None:
    model, tokens = build(num_hidden_layers=1), ids(1, 40)
    got = run(model, streaming(model, True, sink, recent), tokens, (20, 21, 22))
    truth = recomputed(build("eager", num_hidden_layers=1).double(), tokens[0], sink, recent)
    assert_accurate(got[0], truth, recomputed(model, tokens[0], sink, recent), factor=4)


@with_and_without_model
@pytest.mark.parametrize("cuts", [(25,), (25, 26, 27, 28, 35), (2, 14, 15)])
@torch.no_grad()
def test_padding_has_no_place(given: bool, cuts: tuple[int, ...]) -> None:
    model, tokens = build(num_hidden_layers=2), ids(3, 45)
    mask = left_padding(tokens, 0, 17, 3)
    mask[0, 30:33] = 0  # and in the middle, as between the turns of a batch of conversations
    got = run(model, streaming(model, given, recent=14), tokens, cuts, mask)
    for row, first in enumerate((0, 17, 3)):
        seen = mask[row].bool()
        if row == 0:
            continue
        assert_close(got[row, seen], recomputed(model, tokens[row, first:], 3, 14))
    assert_close(got[0, :30], recomputed(model, tokens[0, :30], 3, 14))
    # Padding in a window takes room there, but no place.
    cache = streaming(model, given, recent=14)
    run(model, cache, tokens, cuts, mask)
    place, bias = cache.layers[0].window.places()
    assert int(place[0][bias[0] == 0].max()) == 3 + 14 - 1 - int((mask[0, -14:] == 0).sum())
    assert_same(place[1][bias[1] == 0].sort().values, torch.arange(17))


@pytest.mark.parametrize(
    "kind", ["Llama", "Qwen3", "Glm", "Cohere", "GPTNeoX", "SmolLM3", "Llama, scaled", "Llama, YaRN"]
)
@torch.no_grad()
def test_rotary_embeddings_of_other_models(kind: str) -> None:
    changes: dict[str, Any] = {"num_hidden_layers": 4}
    if kind == "Llama, scaled":
        changes["rope_parameters"] = {
            "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        }  # fmt: skip
    if kind == "Llama, YaRN":
        changes["rope_parameters"] = {
            "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16,
        }  # fmt: skip
    model, tokens = build(kind=kind.split(",")[0], **changes), ids(2, 40)
    room = [run(model, streaming(model, given, 4, 60), tokens, (20, 21)) for given in (True, False)]
    for got in room:
        assert_close(got, model(tokens).logits, 5e-6)
    found, given = (run(model, streaming(model, given), tokens, (20, 21, 22)) for given in (False, True))
    assert_close(found, given, 5e-6)
    assert (found - model(tokens).logits).abs().max() > 1e-3


def note(seen: list[Tensor], module: Any, args: Any, out: Tensor) -> None:
    seen.append(out)


@torch.no_grad()
def test_keys_are_stored_as_they_were() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model, tokens = build(num_hidden_layers=1).to(dtype), ids(1, 40)
        before: list[Tensor] = []
        model.model.layers[0].self_attn.k_proj.register_forward_hook(partial(note, before))
        stored = {}
        for given in (True, False):
            cache = streaming(model, given, 4, 60)
            run(model, cache, tokens, (30, 31))
            stored[given] = cache.layers[0].window.newest()[0]
        exact = torch.cat(before[:3], 1).view(1, 40, G, D).transpose(1, 2)
        assert_same(stored[True], exact)
        # Turned in the model's dtype, turned back in fp32, rounded: three roundings of numbers up to sqrt(2) as large.
        bound = 3 * 2**0.5 * torch.finfo(dtype).eps * exact.float().abs().max()
        assert (stored[False].float() - exact.float()).abs().max() <= bound


@torch.no_grad()
def test_half_precision_is_as_good_as_a_model_in_it() -> None:
    model, tokens = build(num_hidden_layers=2).bfloat16(), ids(1, 60)
    truth = recomputed(build("eager", num_hidden_layers=2).double(), tokens[0], 3, 9)
    plain = recomputed(build("eager", num_hidden_layers=2).bfloat16(), tokens[0], 3, 9)
    for given in (True, False):
        assert_accurate(run(model, streaming(model, given), tokens, (30, 31, 32))[0], truth, plain, factor=3)


@with_and_without_model
@torch.no_grad()
def test_what_every_cache_can(given: bool) -> None:
    check_room_for_everything_changes_nothing(lambda model: streaming(model, given, 4, 60))
    check_batches(lambda model: streaming(model, given))
    check_sampling_and_conversation(lambda model: streaming(model, given))


@torch.no_grad()
def test_generate_pads_batches() -> None:
    model, tokens = build(), ids(2, 30)
    mask = left_padding(tokens, 0, 13)
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False}
    got = model.generate(tokens, attention_mask=mask, past_key_values=streaming(model, False), **options)
    alone = model.generate(tokens[1:, 13:], past_key_values=streaming(model, False), **options)
    assert_same(got[1:, 13:], alone)


@torch.no_grad()
def test_cropping_while_nothing_is_gone() -> None:
    model, tokens = build(), ids(2, 40)
    mask = left_padding(tokens, 0, 6)
    for length in (20, 11, 7, 2):  # the window, then the sinks
        cache = streaming(model, False, 3, 17)
        run(model, cache, tokens[:, :20], mask=mask[:, :20])
        cache.crop(length - 20)
        assert cache.get_seq_length() == length
        got = run(model, cache, tokens[:, length:], (1, 30 - length), mask)
        wanted = run(model, streaming(model, False, 3, 17), tokens, (30,), mask)[:, length:]
        seen = mask[:, length:].bool()
        assert_close(got[seen], wanted[seen])
    cache = streaming(model, False, 3, 17)
    run(model, cache, tokens[:, :21])
    with pytest.raises(NotImplementedError, match="crop"):
        cache.crop(-1)


@torch.no_grad()
def test_the_hook_goes_when_the_cache_does() -> None:
    model = build()
    cache = streaming(model, True)
    assert len(model.model._forward_pre_hooks) == 1
    other = transformers.DynamicCache()
    assert_same(model(ids(1, 9), past_key_values=other).logits, model(ids(1, 9)).logits)  # not its business
    del cache
    gc.collect()
    assert len(model.model._forward_pre_hooks) == 0


@torch.no_grad()
def test_memory_is_told() -> None:
    model, cache = build().bfloat16(), StreamingCache(4, 60)
    assert cache.nbytes == 0
    run(model, cache, ids(2, 10))
    window = 2 * 2 * G * 64 * D * 2 + 2 * 4 * 8  # keys and values, and where the sinks stood
    assert cache.nbytes == LAYERS * window + 2 * 64 * D * 4  # and the angles, once for all


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (TypeError, "sink must be an int", lambda: StreamingCache(0.5, 3)),
        (ValueError, "sink must be >= 0, got -1", lambda: StreamingCache(-1, 3)),
        (ValueError, "recent must be >= 1, got 0", lambda: StreamingCache(4, 0)),
        (TypeError, "model must be .* got int 3", lambda: StreamingCache(4, 9, 3)),
        (TypeError, "model must be .* rotary_emb", lambda: StreamingCache(4, 9, torch.nn.Linear(2, 2))),
    ],
)
def test_wrong_arguments(error: type[Exception], message: str, make: Any) -> None:
    with pytest.raises(error, match=message):
        make()


def test_refusals() -> None:
    with pytest.raises(NotImplementedError, match="attn_implementation='fastok'"), torch.no_grad():
        run(build("sdpa"), StreamingCache(4, 9), ids(1, 20))
    dynamic = build(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0})
    with pytest.raises(NotImplementedError, match="rope_type"), torch.no_grad():
        run(dynamic, StreamingCache(4, 9), ids(1, 20))
    for first in (1, 20):  # a prompt of one token has no window to be seen in its mask
        with pytest.raises(NotImplementedError, match="sliding_window: required, 8"), torch.no_grad():
            run(build(kind="Mistral", sliding_window=8), StreamingCache(4, 9), ids(1, first))
    with pytest.raises(NotImplementedError, match="gradients"):
        run(build(), StreamingCache(4, 9), ids(1, 20))
    cache = StreamingCache(4, 9)
    with pytest.raises(NotImplementedError, match="rotary_emb"):
        cache.update(torch.zeros(1, 2, 4, 16), torch.zeros(1, 2, 4, 16), 0)
