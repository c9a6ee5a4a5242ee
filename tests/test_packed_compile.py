"""Decode steps with ``PackedCache`` inside ``torch.compile``: one graph, the same numbers."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastok.testing import assert_same
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

transformers = pytest.importorskip("transformers")
from test_packed_cache import FORMATS, SMALL_PAGES, PackedCache, build, ids  # noqa: E402


def compiled(model: Any) -> tuple[Callable[..., Tensor], CompileCounterWithBackend]:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def step(tokens: Tensor, cache: Any, **options: Any) -> Tensor:
        logits: Tensor = model(tokens, past_key_values=cache, **options).logits
        return logits

    return step, counter


@pytest.mark.parametrize(("name", "fmt"), [("Llama", "signs and trits"), ("Llama", "two classes"),
                                           ("Gemma 2, softcap, alternating windows", "4 bits")])  # fmt: skip
@torch.no_grad()
def test_steps_are_one_graph_for_all_lengths_and_caches(name: str, fmt: str) -> None:
    model = build(name)
    step, counter = compiled(model)
    for again in range(2):
        cache, same = (PackedCache(FORMATS[fmt], model) for _ in range(2))
        for one in (cache, same):
            model(ids(2, 45), past_key_values=one)
        pages = cache.layers[0].kv.n_pages
        for t in range(18):  # pages are sealed, memory grows
            tokens = ids(2, 1, seed=t)
            assert_same(step(tokens, cache), model(tokens, past_key_values=same).logits)
        assert cache.get_seq_length() == 63
        assert cache.layers[1].kv.n_pages > pages
        assert cache.nbytes == same.nbytes
        if again == 0:
            compilations = counter.frame_count
    assert compilations == 2  # the first length, then any
    assert counter.frame_count <= compilations + 1  # and then any cache


@torch.no_grad()
def test_padding_and_several_rows() -> None:
    model, prompt = build("Llama"), ids(2, 45)
    mask = torch.ones_like(prompt)
    mask[1, :13] = 0
    cache, same = (PackedCache(SMALL_PAGES, model) for _ in range(2))
    for one in (cache, same):
        model(prompt, attention_mask=mask, past_key_values=one)
    step, _ = compiled(model)
    for t, new in enumerate((1, 1, 5, 5)):
        mask = torch.cat([mask, torch.ones(2, new, dtype=torch.long)], 1)
        tokens = ids(2, new, seed=t)
        wanted = model(tokens, past_key_values=same, attention_mask=mask).logits
        assert_same(step(tokens, cache, attention_mask=mask), wanted)
    # A copy has steps of its own.
    copied, tokens = copy.deepcopy(cache), ids(2, 1, seed=9)
    mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    wanted = step(tokens, cache, attention_mask=mask)
    assert copied.layers[0].kv.seq_lens[0, 0] == 57
    assert cache.layers[0].kv.seq_lens[0, 0] == 58
    assert_same(step(tokens, copied, attention_mask=mask), wanted)


@torch.no_grad()
def test_what_would_be_wrong_is_refused() -> None:
    model = build("Llama")
    step, _ = compiled(model)
    for cache, message in (
        (PackedCache(SMALL_PAGES), "attn_implementation='fastok'"),
        (PackedCache(SMALL_PAGES, build("Llama", "sdpa")), "attn_implementation='fastok'"),
    ):
        model(ids(1, 20), past_key_values=cache)
        with pytest.raises(Exception, match=message):
            step(ids(1, 1), cache)
    cache = PackedCache(SMALL_PAGES, model)
    model(ids(1, 20), past_key_values=cache)
    with pytest.raises(Exception, match="steps of up to 16 tokens"):
        step(ids(1, 17), cache)
