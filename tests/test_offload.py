"""``DoubleSparseCache(offload=True)``: the same results from host memory, and from rows fetched ahead."""

import gc
import math
from typing import Any

import pytest
import torch
from cache_cases import (
    D,
    G,
    assert_close,
    build,
    check_batches,
    check_room_for_everything_changes_nothing,
    check_sampling_and_conversation,
    ids,
    left_padding,
    run,
)
from fastok.caches.host import HostKV
from fastok.integrations import offload
from fastok.sparse import Calibration, DoubleSparseCache, calibrate
from fastok.testing import assert_same
from torch import Tensor

pytest.importorskip("transformers")

SHARP = {"initializer_range": 0.1}


def calibration(model: Any) -> Calibration:
    return calibrate(model, [ids(2, 40, seed=9)], 4, statistic="k")


def offloaded(model: Any, n_keep: float = 20, ahead: bool = True, **options: Any) -> DoubleSparseCache:
    options = {"dense_layers": (0,), "recent": 4} | options
    return DoubleSparseCache(calibration(model), n_keep, offload=True, prefetch=model if ahead else None, **options)


CUTS = (100, 101, 102, 107, 108, 125, 126)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("bits", "sink"), [(16, 0), (4, 3)])
@torch.no_grad()
def test_neither_host_memory_nor_prefetching_changes_results(shared: bool, bits: int, sink: int) -> None:
    model, tokens, options = build(**SHARP), ids(2, 130), {"shared": shared, "bits": bits, "sink": sink}
    mask = left_padding(tokens, 0, 60)
    for given in (None, mask):
        resident = DoubleSparseCache(calibration(model), 20, dense_layers=(0,), recent=4, **options)
        wanted = run(model, resident, tokens, CUTS, given)
        without, ahead = (offloaded(model, ahead=ahead, **options) for ahead in (False, True))
        got = run(model, without, tokens, CUTS, given)
        assert_close(got, wanted, 2e-5)
        assert_same(run(model, ahead, tokens, CUTS, given), got)
        assert without.prefetched == 0
        assert 0.3 < ahead.prefetched < 1


@pytest.mark.parametrize("guess", ["random", "opposite", "nothing like it"])
@torch.no_grad()
def test_wrong_guesses_change_nothing(guess: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = build(**SHARP), ids(2, 130)
    wanted = run(model, offloaded(model, ahead=False), tokens, CUTS)
    guessed = offload._guessed

    def wrong(*args: Any) -> Tensor:
        q = guessed(*args)
        return {"random": torch.randn_like(q), "opposite": -q, "nothing like it": torch.full_like(q, math.nan)}[guess]

    monkeypatch.setattr(offload, "_guessed", wrong)
    cache = offloaded(model)
    assert_same(run(model, cache, tokens, CUTS), wanted)
    assert cache.prefetched < 0.9


@torch.no_grad()
def test_generating_is_the_same() -> None:
    model, prompt = build(**SHARP), ids(2, 80)
    mask = left_padding(prompt, 0, 20)
    for options in ({"num_beams": 1}, {"num_beams": 3}, {"do_sample": True}):
        results = []
        for ahead in (False, True):
            torch.manual_seed(0)
            cache = offloaded(model, ahead=ahead)
            results.append(
                model.generate(prompt, attention_mask=mask, past_key_values=cache, max_new_tokens=12, **options)
            )
        assert_same(results[1], results[0])


@torch.no_grad()
def test_only_what_is_attended_to_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens, copied = build(**SHARP), ids(2, 130), []
    places = HostKV.places

    def counted(self: HostKV, batch: Tensor, head: Tensor, token: Tensor, device: torch.device) -> Any:
        copied.append(token.numel())
        return places(self, batch, head, token, device)

    monkeypatch.setattr(HostKV, "places", counted)
    cache = offloaded(model, ahead=False)
    run(model, cache, tokens)
    with monkeypatch.context() as patched:
        patched.setattr(HostKV, "all", None)  # nobody asks for everything
        run(model, cache, ids(2, 1))
    assert copied == [2 * G * 19] * 3  # the newest token comes from the device
    cache = offloaded(model)
    run(model, cache, tokens)
    copied.clear()
    run(model, cache, ids(2, 1))
    rows = 3 * 2 * G * 19
    assert 0 < cache.prefetched < 1
    assert sum(copied) == rows + round((1 - cache.prefetched) * rows)  # by the guesses, and what they did not see


@torch.no_grad()
def test_memory_is_told_by_place() -> None:
    model = build().bfloat16()
    cache = offloaded(model, dense_layers=(), bits=4)
    run(model, cache, ids(2, 500))
    keys_and_values = 4 * 2 * 2 * G * 500 * D * 2
    labels = sum(layer.labels.nbytes for layer in cache.layers)
    assert cache.device_nbytes == labels < keys_and_values / 7
    assert cache.nbytes == keys_and_values + labels


@torch.no_grad()
def test_what_every_cache_can() -> None:
    check_room_for_everything_changes_nothing(lambda model: offloaded(model, 1000))
    check_batches(lambda model: offloaded(model, 12))
    check_sampling_and_conversation(lambda model: offloaded(model, 12))


@torch.no_grad()
def test_cropping() -> None:
    model, tokens, step = build(**SHARP), ids(2, 130), ids(2, 3, seed=5)
    resident = DoubleSparseCache(calibration(model), 20, dense_layers=(0,), recent=4)
    results = []
    for cache in (resident, offloaded(model, ahead=False), offloaded(model)):
        run(model, cache, tokens, (100, 101, 110))
        cache.crop(-25)
        assert cache.get_seq_length() == 105
        results.append(run(model, cache, step, (1, 2)))
    assert_close(results[1], results[0], 2e-5)
    assert_same(results[2], results[1])


@torch.no_grad()
def test_the_hooks_go_when_the_cache_does() -> None:
    model = build()
    cache = offloaded(model)
    hooks = [layer.self_attn._forward_pre_hooks for layer in model.model.layers]
    assert [len(one) for one in hooks] == [1, 1, 1, 0]
    run(model, DoubleSparseCache(calibration(model), 20), ids(1, 40), (38, 39))  # not its business
    assert math.isnan(cache.prefetched)
    del cache
    gc.collect()
    assert [len(one) for one in hooks] == [0] * 4


def test_refusals() -> None:
    model = build()
    with pytest.raises(ValueError, match="prefetch must be None without offload=True"):
        DoubleSparseCache(calibration(model), 20, prefetch=model)
    with pytest.raises(ValueError, match="model must be the one that was calibrated"):
        DoubleSparseCache(calibration(model), 20, offload=True, prefetch=build(**SHARP))
    with pytest.raises(NotImplementedError, match="keep"):
        HostKV().keep(torch.zeros(1, 1, 1, dtype=torch.int64))
