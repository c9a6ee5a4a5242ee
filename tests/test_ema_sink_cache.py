"""``EMASinkCache``: sinks that move, in fp32, against an emulation token by token."""

from typing import Any

import pytest
import torch
from cache_cases import (
    LAYERS,
    Attend,
    D,
    G,
    assert_close,
    build,
    check_batches,
    check_room_for_everything_changes_nothing,
    check_sampling_and_conversation,
    emulated,
    ids,
    left_padding,
    run,
    turned,
)
from fastok.caches.window import Window
from fastok.integrations.ema_sink_cache import MovingSinks
from fastok.sparse import EMASinkCache, StreamingCache
from fastok.testing import assert_accurate, assert_same
from torch import Tensor

pytest.importorskip("transformers")


def moving(sink: int, recent: int, alpha: float) -> Attend:
    """EMA-Sink's attention of one stream, token by token, keys without rotary embedding."""
    stored: dict[int, list[Any]] = {}

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sinks, window, gone = stored.setdefault(layer, [[], [], 0])
        out = []
        for t in range(q.shape[1]):
            window.append((k[:, t], v[:, t]))
            if len(window) > recent:
                token = window.pop(0)
                if len(sinks) < sink:
                    sinks.append(token)
                else:
                    slot = gone % sink
                    sinks[slot] = tuple(alpha * a + (1 - alpha) * b for a, b in zip(sinks[slot], token, strict=True))
                    gone += 1
            keys, values = (torch.stack(x, 1) for x in zip(*sinks, *window, strict=True))
            place = torch.arange(keys.shape[1], dtype=keys.dtype)
            p = (turned(q[:, t : t + 1], place[-1:]) @ turned(keys, place).mT * D**-0.5).softmax(-1)
            out.append(p @ values)
        stored[layer][2] = gone
        return torch.cat(out, 1)

    return attend


@pytest.mark.parametrize("given", [True, False], ids=["model given", "model found"])
@pytest.mark.parametrize(
    ("sink", "recent", "cuts"),
    [
        (3, 9, tuple(range(1, 60))), (3, 9, ()), (3, 9, (9, 12, 15, 40, 41)), (4, 8, (30, 31, 59)), (5, 2, (20,)),
        (1, 1, (7,)),
    ],
)  # fmt: skip
@torch.no_grad()
def test_sinks_take_up_what_leaves_however_it_is_cut(
    given: bool, sink: int, recent: int, cuts: tuple[int, ...]
) -> None:
    model, tokens = build(num_hidden_layers=2), ids(2, 60)
    got = run(model, EMASinkCache(sink, recent, 0.7, model if given else None), tokens, cuts)
    for row in range(2):
        wanted = emulated(model, tokens[row], (), moving(sink, recent, 0.7), rope=False)
        exact = build("eager", num_hidden_layers=2).double()
        truth = emulated(exact, tokens[row], (), moving(sink, recent, 0.7), rope=False)
        assert_accurate(got[row], truth, wanted, factor=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_small_steps_are_not_lost(dtype: torch.dtype) -> None:
    sink, n = 4, 700
    first, token = torch.randn(1, 2, sink, 8).to(dtype), torch.randn(1, 2, sink, 8).to(dtype)
    window = Window(sink, sink, first, first)
    sinks = MovingSinks(window, 0.999)
    window.push(first, first)
    for _ in range(n + 1):  # each block pushes the one before out, place by place; the first becomes the sinks
        gone = window.push(token, token)
        assert gone is not None
        sinks.fold(gone)
    faded = 0.999**n
    assert int(sinks.count) == n * sink
    assert_close(sinks.k, faded * first.float() + (1 - faded) * token.float(), 1e-4)
    assert_same(window.v[:, :, :sink], sinks.v.to(dtype))
    lost = first.clone()
    for _ in range(n):
        lost = 0.999 * lost + 0.001 * token
    stuck = (lost == first).float().mean()
    assert bool(stuck > 0.5) == (dtype == torch.bfloat16)  # why the averages are fp32


@torch.no_grad()
def test_alpha_one_is_a_streaming_cache() -> None:
    model, tokens, cuts = build(), ids(2, 50), (20, 21, 22, 35)
    assert_close(run(model, EMASinkCache(3, 9, 1.0), tokens, cuts), run(model, StreamingCache(3, 9), tokens, cuts))
    moved = run(model, EMASinkCache(3, 9, 0.5), tokens, cuts)
    assert (moved - run(model, StreamingCache(3, 9), tokens, cuts)).abs().max() > 1e-3


@torch.no_grad()
def test_padding_is_not_taken_up() -> None:
    model, tokens, cuts = build(num_hidden_layers=2), ids(2, 60), (30, 31, 32, 50)
    mask = left_padding(tokens, 0, 11)
    got = run(model, EMASinkCache(3, 9, 0.7), tokens, cuts, mask)
    wanted = emulated(model, tokens[1, 11:], (), moving(3, 9, 0.7), rope=False)
    assert_close(got[1, 11:], wanted)
    assert_close(got[0], emulated(model, tokens[0], (), moving(3, 9, 0.7), rope=False))


@torch.no_grad()
def test_memory_is_constant_and_told() -> None:
    model, cache, sizes = build().bfloat16(), EMASinkCache(4, 20), set()
    for end in (10, 11, 40, 41, 90):
        model(ids(2, 90)[:, cache.get_seq_length() : end], past_key_values=cache)
        sizes.add(cache.nbytes)
    of_layer = 2 * 2 * G * 24 * D * 2 + 2 * 4 * 8 + 2 * 2 * G * 4 * D * 4 + 2 * 8
    assert sizes == {LAYERS * of_layer + 2 * 24 * D * 4}


@torch.no_grad()
def test_what_every_cache_can() -> None:
    check_room_for_everything_changes_nothing(lambda model: EMASinkCache(4, 60))
    check_batches(lambda model: EMASinkCache(3, 9, 0.7))
    check_sampling_and_conversation(lambda model: EMASinkCache(3, 9, 0.7))
    model, tokens = build(), ids(2, 40)
    cache = EMASinkCache(3, 30, 0.7)
    run(model, cache, tokens[:, :33])
    cache.crop(-13)
    assert_close(run(model, cache, tokens[:, 20:], (1,)), run(model, EMASinkCache(3, 30, 0.7), tokens)[:, 20:])
    with pytest.raises(NotImplementedError, match="crop"):
        cache.crop(-1)


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (ValueError, "sink must be >= 1, got 0", lambda: EMASinkCache(0, 3)),
        (TypeError, "recent must be an int", lambda: EMASinkCache(3, 0.5)),
        (ValueError, "alpha must be within", lambda: EMASinkCache(3, 9, 1.5)),
        (NotImplementedError, "EMASinkLayer: required", lambda: run(build("sdpa"), EMASinkCache(3, 9), ids(1, 9))),
    ],
)  # fmt: skip
def test_refusals(error: type[Exception], message: str, make: Any) -> None:
    with pytest.raises(error, match=message), torch.no_grad():
        make()
