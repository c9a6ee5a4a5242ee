"""What fastok's caches for transformers refuse: keys and values that do not go with what they hold."""

from typing import Any

import pytest
import torch
from cache_cases import CACHES, D, G, build, ids, run
from fastok.testing import assert_same

pytest.importorskip("transformers")

WRONG = {
    "batch": ((3, G, 1, D), (3, G, 1, D), r"key_states must have shape .* here \[2, 2, \*, 16\]; got \[3, 2, 1, 16\]"),
    "heads": ((2, 1, 1, D), (2, 1, 1, D), r"key_states must have shape .* got \[2, 1, 1, 16\]"),
    "width": ((2, G, 1, D - 8), (2, G, 1, D - 8), r"key_states must have shape .* got \[2, 2, 1, 8\]"),
    "dimensions": ((2, G, D), (2, G, D), r"key_states must have shape \[B,G,S,D\] of the cache.* got \[2, 2, 16\]"),
    "values' tokens": ((2, G, 2, D), (2, G, 1, D), r"value_states must have shape .* got \[2, 2, 1, 16\]"),
    "values' width": ((2, G, 1, D), (2, G, 1, D + 8), r"value_states must have shape .* got \[2, 2, 1, 24\]"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", CACHES)
def test_other_shapes_are_refused_and_change_nothing(name: str, wrong: str) -> None:
    model, tokens = build(), ids(2, 43)
    keys, values, message = WRONG[wrong]
    refusing, other = CACHES[name](model), CACHES[name](model)
    with torch.no_grad():
        for cache in (refusing, other):
            run(model, cache, tokens[:, :41], (40,))
        with pytest.raises(ValueError, match=message):
            refusing.update(torch.randn(keys), torch.randn(values), 0)
        assert_same(run(model, refusing, tokens[:, 41:]), run(model, other, tokens[:, 41:]))


@pytest.mark.parametrize("name", [name for name in CACHES if name != "streaming without model"])
def test_a_first_call_needs_keys_and_values_of_each_other(name: str) -> None:
    cache: Any = CACHES[name](build())
    with pytest.raises(ValueError, match=r"key_states must have shape \[B,G,S,D\], here"):
        cache.update(torch.randn(2, G, D), torch.randn(2, G, D), 0)
    with pytest.raises(
        ValueError, match=r"value_states must have shape \[B,G,S,D\], here \[2, 2, 5, \*\]; got \[2, 2, 4, 16\]"
    ):
        cache.update(torch.randn(2, G, 5, D), torch.randn(2, G, 4, D), 0)
    assert cache.get_seq_length() == 0
