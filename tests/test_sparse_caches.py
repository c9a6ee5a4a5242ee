"""Double Sparsity, TidalDecode, SnapKV and PyramidKV as caches of transformers models."""

import warnings
from typing import Any

import fastok
import pytest
import torch
from cache_cases import assert_close, check_batches, run
from fastok.sparse import Calibration, DoubleSparseCache, PyramidKVCache, SnapKVCache, TidalCache, calibrate
from fastok.testing import assert_accurate, assert_same
from torch import Tensor

transformers = pytest.importorskip("transformers")
fastok.register_transformers()

LAYERS, H, G, D = 4, 4, 2, 16
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": H * D, "intermediate_size": 96, "num_hidden_layers": LAYERS,
    "num_attention_heads": H, "num_key_value_heads": G, "head_dim": D, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip


def build(attention: str = "fastok") -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, attn_implementation=attention)
    return transformers.LlamaForCausalLM(config).eval()


def ids(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(2, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def calibration(model: Any, r: int = 4) -> Calibration:
    return calibrate(model, [ids(2, 40, seed=9)], r, statistic="k")


CACHES = {
    "Double Sparsity": lambda model: DoubleSparseCache(calibration(model), 1000),
    "TidalDecode": lambda model: TidalCache(1000, select_layers=(1, 3)),
    "SnapKV": lambda model: SnapKVCache(1000),
    "PyramidKV": lambda model: PyramidKVCache(1000, LAYERS),
}
over_caches = pytest.mark.parametrize("name", CACHES)


@over_caches
@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_a_budget_for_everything_changes_nothing(name: str, beams: int) -> None:
    model, prompt = build(), ids(2, 30)
    options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "num_beams": beams}
    wanted = model.generate(prompt, **options)
    assert_same(model.generate(prompt, past_key_values=CACHES[name](model), **options), wanted)


@over_caches
@torch.no_grad()
def test_conversations_cropping_and_forgetting(name: str) -> None:
    model, cache = build(), CACHES[name](build())
    tokens = ids(2, 70)
    model(tokens[:, :40], past_key_values=cache)
    model(tokens[:, 40:43], past_key_values=cache)
    model(tokens[:, 43:], past_key_values=cache)
    cache.crop(-10)
    assert cache.get_seq_length() == 60
    got = model(tokens[:, 60:61], past_key_values=cache).logits[:, -1]
    wanted = model(tokens[:, :61]).logits[:, -1]
    truth = build("eager").double()(tokens[:, :61]).logits[:, -1]
    assert_accurate(got, truth, wanted, factor=8)
    assert cache.nbytes > 0
    cache.reset()
    assert cache.get_seq_length() == 0
    model(tokens[:1, :9], past_key_values=cache)
    assert cache.get_seq_length() == 9


@pytest.mark.parametrize("name", ["Double Sparsity", "TidalDecode"])
@torch.no_grad()
def test_other_attention_gets_everything_and_a_warning(name: str) -> None:
    model, prompt, step = build("sdpa"), ids(2, 30), ids(2, 1, seed=2)
    cache = CACHES[name](build())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(prompt, past_key_values=cache)
        got = model(step, past_key_values=cache).logits
    assert any("unpacked in every step" in str(one.message) for one in caught)
    wanted = model(torch.cat([prompt, step], 1)).logits[:, -1:]
    truth = build("eager").double()(torch.cat([prompt, step], 1)).logits[:, -1:]
    assert_accurate(got, truth, wanted, factor=8)


def attended(model: Any, cache: Any, step: Tensor, **options: Any) -> list[tuple[Tensor, Tensor]]:
    """What each layer's `to_tokens` is called with in one step: queries and tokens (None: all)."""
    seen: list[tuple[Tensor, Tensor]] = []
    for layer in cache.layers:
        own = layer.to_tokens

        def spy(tokens: Any, q: Tensor, *rest: Any, own: Any = own) -> Any:
            seen.append((q, tokens))
            return own(tokens, q, *rest)

        layer.to_tokens = spy
    model(step, past_key_values=cache, **options)
    for layer in cache.layers:
        del layer.to_tokens
    return seen


@pytest.mark.parametrize("shared", [True, False])
@torch.no_grad()
def test_double_sparsity_attends_to_few_tokens_of_each_sequence(shared: bool) -> None:
    model, prompt = build(), ids(2, 100)
    mask = torch.ones_like(prompt)
    mask[1, :60] = 0  # left padding
    cache = DoubleSparseCache(calibration(model), 20, dense_layers=(0,), sink=2, recent=4, shared=shared)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    model(prompt, attention_mask=mask, position_ids=position, past_key_values=cache)
    mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    seen = attended(model, cache, ids(2, 1), attention_mask=mask, position_ids=position[:, -1:] + 1)
    assert seen[0][1] is None
    for _, tokens in seen[1:]:
        assert tokens.shape == (2, G if shared else H, 20)
        assert bool((tokens[..., -4:] == torch.arange(97, 101)).all())
        assert bool((tokens[0, :, :2] == torch.arange(2)).all())
        assert bool((tokens[1, :, :2] == torch.arange(60, 62)).all())  # no padding


@torch.no_grad()
def test_a_share_of_the_tokens() -> None:
    model = build()
    cache = DoubleSparseCache(calibration(model), 0.25, dense_layers=())
    model(ids(1, 399), past_key_values=cache)
    assert attended(model, cache, ids(1, 1))[0][1].shape[-1] == 100
    short = DoubleSparseCache(calibration(model), 0.25, dense_layers=())
    model(ids(1, 50), past_key_values=short)
    assert attended(model, short, ids(1, 1))[0][1] is None


@torch.no_grad()
def test_tidal_layers_reuse_the_last_choice() -> None:
    model = build()
    cache = TidalCache(12, select_layers=(1, 3))
    model(ids(2, 60), past_key_values=cache)
    seen = attended(model, cache, ids(2, 1))
    assert [tokens is None for _, tokens in seen] == [True, True, False, True]
    logits = (seen[1][0][:, 0, :, None] * cache.layers[1].kv.k.transpose(1, 2).repeat_interleave(2, 1)).sum(-1)
    best = logits.unflatten(1, (G, 2)).amax(2)[..., :-1].topk(11).indices.sort().values
    assert_same(seen[2][1][..., :-1], best)
    assert bool((seen[2][1][..., -1] == 60).all())


@torch.no_grad()
def test_tidal_lists_of_query_heads_are_their_own_and_made_anew_in_every_step() -> None:
    model = build()
    cache = TidalCache(12, select_layers=(1,), shared=False)
    model(ids(2, 60), past_key_values=cache)
    before = None
    for step in range(2):
        seen = attended(model, cache, ids(2, 1, seed=step))
        logits = (seen[1][0][:, 0, :, None] * cache.layers[1].kv.k.transpose(1, 2).repeat_interleave(2, 1)).sum(-1)
        best = logits[..., :-1].topk(11).indices.sort().values
        assert seen[2][1].shape == (2, H, 12)
        assert_same(seen[2][1][..., :-1], best)
        assert_same(seen[3][1], seen[2][1])
        assert bool((seen[2][1][..., -1] == 60 + step).all())
        assert before is None or not torch.equal(best, before)
        before = best
    assert bool((best[:, 0] != best[:, 1]).any())


@torch.no_grad()
@pytest.mark.parametrize("offload", [False, True])
def test_sinks_of_samples_with_padding_are_their_own_first_tokens(offload: bool) -> None:
    model, tokens, missing = build(), ids(2, 50), 9
    mask = torch.ones(2, 50, dtype=torch.int64)
    mask[1, :missing] = 0
    place = (mask.cumsum(1) - 1).clamp(min=0)
    how = {"dense_layers": (), "sink": 3, "recent": 1, "offload": offload, "prefetch": model if offload else None}
    both, alone = (DoubleSparseCache(calibration(model), 6, **how) for _ in range(2))
    for begin, end in ((0, 40), *((n, n + 1) for n in range(40, 50))):
        new, first = slice(begin, end), max(begin, missing)
        options = {"attention_mask": mask[:, :end], "position_ids": place[:, new]}
        got = model(tokens[:, new], past_key_values=both, **options).logits[1:, first - begin :]
        wanted = model(tokens[1:, first:end], past_key_values=alone).logits
        assert (got - wanted).abs().max() < 1e-5


@torch.no_grad()
def test_tidal_samples_with_padding_are_what_they_are_alone() -> None:
    model, prompt, steps = build(), ids(2, 60), ids(2, 3, seed=4)
    mask = torch.ones(2, 63, dtype=torch.long)
    mask[1, :25] = 0
    cache, alone = TidalCache(12, select_layers=(1, 3)), TidalCache(12, select_layers=(1, 3))
    got = run(model, cache, torch.cat([prompt, steps], 1), (60, 61, 62), mask)[1, 60:]
    wanted = run(model, alone, torch.cat([prompt, steps], 1)[1:, 25:], (35, 36, 37))[0, 35:]
    assert_close(got, wanted)


@over_caches
@torch.no_grad()
def test_batches_selected_and_reordered(name: str) -> None:
    check_batches(CACHES[name])


@pytest.mark.parametrize("kind", ["Double Sparsity", "TidalDecode"])
def test_layers_whose_values_are_of_another_width(kind: str) -> None:
    """As multi-head latent attention has them: keys of 20 channels, values of 12."""
    k, v, q = torch.randn(2, G, 50, 20), torch.randn(2, G, 50, 12), torch.randn(2, 1, H, 20)
    if kind == "Double Sparsity":
        channels = torch.arange(20).expand(1, G, 20).clone()
        cache: Any = DoubleSparseCache(Calibration(channels, "k", "", ""), 8, dense_layers=(), recent=1)
    else:
        cache = TidalCache(8, select_layers=(0,))
    cache.update(k, v, 0)
    cache.update(k, v, 1 if kind == "TidalDecode" else 0)
    layers = cache.layers
    out, lse = [layer.attend(q, 20**-0.5, None, None) for layer in layers][-1]
    keys, values = (torch.cat([x, x], 2) if kind == "Double Sparsity" else x for x in (k, v))
    logits = (q[:, 0].unflatten(1, (G, 2)) @ keys.mT) * 20**-0.5
    best = logits.amax(2)[..., :-1].topk(7).indices
    tokens = torch.cat([best, torch.full((2, G, 1), keys.shape[2] - 1)], 2)[:, :, None].expand(-1, -1, 2, -1)
    wanted = logits.gather(3, tokens)
    rows = values[:, :, None].expand(-1, -1, 2, -1, -1).gather(3, tokens[..., None].expand(*tokens.shape, 12))
    assert_close(out[:, 0], (wanted.softmax(-1)[..., None] * rows).sum(3).flatten(1, 2))
    assert_close(lse[:, :, 0], wanted.logsumexp(-1).flatten(1))


@torch.no_grad()
def test_memory_includes_the_labels() -> None:
    model = build()
    for bits, of_label in ((16, 4 * 4), (4, 2 + 2)):
        cache = DoubleSparseCache(calibration(model), 20, dense_layers=(0,), bits=bits)
        model(ids(2, 96), past_key_values=cache)
        rows = LAYERS * 2 * G * 96 * 2 * D * 4
        assert cache.nbytes == rows + (LAYERS - 1) * G * (2 * 96 * of_label + 4 * 8)


@torch.no_grad()
def test_snapkv_keeps_what_the_last_queries_attend_to() -> None:
    model, prompt = build(), ids(2, 80)
    with fastok.record_scores(fastok.ScoreSpec(rows=(-8, None), cols=(0, -8), heads="group_mean", pool=3)) as recorded:
        model(prompt)
    cache = SnapKVCache(24, window=8, pool=3)
    model(prompt, past_key_values=cache)
    dense = transformers.DynamicCache()
    model(prompt, past_key_values=dense)
    for layer, scores, whole in zip(cache.layers, recorded, dense.layers, strict=True):
        best = scores[0].topk(16).indices.sort().values
        kept = torch.cat([best, torch.arange(72, 80).expand(2, G, 8)], 2)
        assert_same(layer.kept, kept)
        assert_same(layer.kv.k.transpose(1, 2), whole.keys.gather(2, kept[..., None].expand(-1, -1, -1, D)))
    assert cache.nbytes == LAYERS * 2 * G * 24 * (2 * D * 4 + 8)  # keys, values, and where they stood
    # A step attends to those, and to itself.
    got = model(ids(2, 1, seed=3), past_key_values=cache).logits
    results = []
    for dtype in (torch.float64, torch.float32):
        same = transformers.DynamicCache()
        for index, layer in enumerate(cache.layers):
            same.update(*(x.transpose(1, 2)[:, :, :24].to(dtype) for x in (layer.kv.k, layer.kv.v)), index)
        peer = build("eager").to(dtype)
        position = torch.full((2, 1), 80)
        results.append(peer(ids(2, 1, seed=3), past_key_values=same, position_ids=position).logits)
    assert_accurate(got, *results, factor=8)


@torch.no_grad()
def test_snapkv_after_padding() -> None:
    model, prompt = build(), ids(2, 80)
    mask = torch.ones_like(prompt)
    mask[1, :50] = 0
    position = (mask.cumsum(1) - 1).clamp(min=0)
    cache = SnapKVCache(40, window=8, pool=1)
    model(prompt, attention_mask=mask, position_ids=position, past_key_values=cache)
    assert bool((cache.layers[2].kept[1, :, -30:] >= 50).all())  # all 30 tokens that are not padding
    mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    step = {"attention_mask": mask, "position_ids": position[:, -1:] + 1}
    got = model(ids(2, 1), past_key_values=cache, **step).logits[1]
    alone = transformers.DynamicCache()
    model(prompt[1:, 50:], past_key_values=alone)
    wanted = model(ids(2, 1)[1:], past_key_values=alone).logits[0]
    truth = build("eager").double()(torch.cat([prompt[1:, 50:], ids(2, 1)[1:]], 1)).logits[0, -1:]
    assert_accurate(got, truth, wanted, factor=8)


@torch.no_grad()
def test_pyramidkv_capacities_fall() -> None:
    model, cache = build(), PyramidKVCache(40, LAYERS, beta=4, window=8)
    model(ids(1, 200), past_key_values=cache)
    # mean 32: from 2 * 32 - 8 = 56 down by 56 - 8 = 48 over 3 steps of 16; the window of 8 besides
    assert [layer.kv.length for layer in cache.layers] == [64, 48, 32, 16]
    short = PyramidKVCache(40, LAYERS, beta=4, window=8)
    model(ids(1, 60), past_key_values=short)
    assert [layer.kv.length for layer in short.layers] == [40] * LAYERS


@torch.no_grad()
def test_what_was_evicted_cannot_come_back() -> None:
    model, cache = build(), SnapKVCache(24, window=8)
    model(ids(1, 80), past_key_values=cache)
    model(ids(1, 3), past_key_values=cache)
    cache.crop(-3)
    assert cache.get_seq_length() == 80
    with pytest.raises(NotImplementedError, match="evicted"):
        cache.crop(-1)
    with pytest.raises(NotImplementedError, match="attn_implementation"):
        build("sdpa")(ids(1, 1), past_key_values=cache)


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (TypeError, "calibration", lambda model: DoubleSparseCache([3], 8)),
        (ValueError, "n_keep", lambda model: DoubleSparseCache(calibration(model), 8, recent=9)),
        (ValueError, "n_keep", lambda model: DoubleSparseCache(calibration(model), 0.0)),
        (ValueError, "bits", lambda model: DoubleSparseCache(calibration(model), 80, bits=3)),
        (ValueError, "shared must be", lambda model: DoubleSparseCache(calibration(model), 80, shared="most")),
        (TypeError, "dense_layers must be", lambda model: DoubleSparseCache(calibration(model), 80, dense_layers=0)),
        (
            ValueError,
            "dense_layers must be",
            lambda model: DoubleSparseCache(calibration(model), 80, dense_layers=(-1,)),
        ),
        (ValueError, "n_keep", lambda model: TidalCache(0)),
        (TypeError, "select_layers must be", lambda model: TidalCache(8, select_layers=2)),
        (TypeError, "select_layers must be", lambda model: TidalCache(8, select_layers=(1.5,))),
        (TypeError, "shared must be", lambda model: TidalCache(8, shared="sum")),
        (ValueError, "select_layers", lambda model: TidalCache(8, select_layers=())),
        (ValueError, "capacity", lambda model: SnapKVCache(32)),
        (ValueError, "pool", lambda model: SnapKVCache(64, pool=4)),
        (ValueError, "beta", lambda model: PyramidKVCache(64, 4, beta=0)),
    ],
)
def test_refusals(error: type[Exception], message: str, make: Any) -> None:
    with pytest.raises(error, match=message):
        make(build())
