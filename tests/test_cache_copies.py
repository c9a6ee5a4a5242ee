"""What can be done with any of fastok's caches for transformers as an object: copy, pickle, let go."""

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from cache_cases import CACHES, build, ids, run
from fastok.testing import assert_same

pytest.importorskip("transformers")

COPIES = {"copied": copy.deepcopy, "pickled": lambda cache: pickle.loads(pickle.dumps(cache))}
PROMPT, STEPS = 40, (40, 41, 44)


def answer(model: Any, cache: Any, seed: int) -> torch.Tensor:
    """Logits of some tokens, three calls of them if the cache is empty and one if not."""
    tokens = ids(2, 45, seed=seed)
    with torch.no_grad():
        return run(model, cache, tokens, STEPS) if cache.get_seq_length() == 0 else run(model, cache, tokens[:, :3])


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", CACHES)
def test_a_copy_goes_on_by_itself(name: str, how: str) -> None:
    """An empty one too: its layers are made in the same order, and share nothing with the other's."""
    model = build(initializer_range=0.2)
    for filled in (False, True):
        cache, wanted = CACHES[name](model), CACHES[name](model)
        if filled:
            for one in (cache, wanted):
                answer(model, one, 1)
        if name in ("streaming", "ema") and filled:
            continue  # a copy's keys have been turned, and are turned back: close, but not the same
        other = COPIES[how](cache)
        first, second = answer(model, cache, 2), answer(model, other, 2)
        wanted = answer(model, wanted, 2)
        assert_same(first, wanted)
        if name in ("streaming", "ema"):
            assert (second - wanted).abs().max() < 1e-4 * wanted.abs().max()
        else:
            assert_same(second, wanted)
        again = answer(model, other, 3)
        if name not in ("streaming", "ema"):
            assert_same(answer(model, cache, 3), again)
        assert [type(layer) for layer in cache.layers] == [type(layer) for layer in other.layers]


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_goes_when_its_last_name_does(name: str) -> None:
    """With all its memory, and its hook on the model, not whenever the collector of cycles comes by."""
    model = build()
    hooks = [dict(module._forward_pre_hooks) for module in model.modules()]
    cache = CACHES[name](model)
    answer(model, cache, 1)
    layer = weakref.ref(cache.layers[2])
    gc.disable()
    try:
        del cache
        assert layer() is None
        assert [dict(module._forward_pre_hooks) for module in model.modules()] == hooks
    finally:
        gc.enable()
