"""Decode steps with ``PackedCache`` inside ``torch.compile``: one graph, the same numbers."""

import copy
import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastok import attention_decode
from fastok.integrations.compiled_step import register
from fastok.testing import assert_same
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

transformers = pytest.importorskip("transformers")
from test_packed_cache import FORMATS, SMALL_PAGES, PackedCache, build, ids  # noqa: E402


def compiled(model: Any, backend: str = "aot_eager") -> tuple[Callable[..., Tensor], CompileCounterWithBackend]:
    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend)

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


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="inductor needs a C++ compiler")
@torch.no_grad()
def test_steps_with_the_default_backend() -> None:
    """Inductor's kernels around the op, which it neither drops nor moves; pages are sealed on the way."""
    model = build("Llama")
    cache, same = (PackedCache(SMALL_PAGES, model) for _ in range(2))
    for one in (cache, same):
        model(ids(1, 20), past_key_values=one)
    step, _ = compiled(model, "inductor")
    pages = cache.layers[0].kv.n_pages
    for t in range(12):
        tokens = ids(1, 1, seed=t)
        torch.testing.assert_close(step(tokens, cache), model(tokens, past_key_values=same).logits)
    assert cache.layers[1].kv.n_pages > pages
    assert_same(cache.layers[1].kv.seq_lens, same.layers[1].kv.seq_lens)


# ---- the op ----------------------------------------------------------------------------------------------------------


class Stateless:
    """A layer that forgets, so that the op can be called as often as a check likes."""

    def step(
        self, q: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float | None, key_bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        k, v = keys.transpose(1, 2), values.transpose(1, 2)
        return attention_decode(q, (k, v, None), scale=scale, softcap=softcap, key_bias=key_bias)


def arguments(rows: int, softcap: float, with_bias: bool) -> tuple[Any, ...]:
    keys, values = torch.randn(2, 2, rows, 32), torch.randn(2, 2, rows, 16)
    return torch.randn(2, rows, 4, 32), keys, values, 0.2, softcap, torch.randn(2, rows) if with_bias else None


@pytest.mark.parametrize(("rows", "softcap", "with_bias"), [(1, 0.0, False), (5, 2.0, True)])
def test_opcheck(rows: int, softcap: float, with_bias: bool) -> None:
    layer = Stateless()
    which = register(layer)
    torch.library.opcheck(torch.ops.fastok.cache_step.default, (which, *arguments(rows, softcap, with_bias)))


def test_the_op_counts_steps_and_touches_nothing_else() -> None:
    layer, given = Stateless(), arguments(3, 2.0, True)
    which = register(layer)
    number = int(which[0])
    before = [x.clone() for x in given if isinstance(x, Tensor)]
    out, lse = torch.ops.fastok.cache_step(which, *given)
    assert which.tolist() == [number, 1]
    for x, old in zip([x for x in given if isinstance(x, Tensor)], before, strict=True):
        assert_same(x, old)
    wanted = layer.step(*given)
    assert_same(out, wanted[0])
    assert_same(lse, wanted[1])
    schema = torch.ops.fastok.cache_step.default._schema
    assert [argument.name for argument in schema.arguments if argument.is_write] == ["which"]
