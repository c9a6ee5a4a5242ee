"""``H2OCache``: heavy hitters and recent tokens, per head, against an emulation in plain PyTorch."""

from typing import Any

import fastok
import pytest
import torch
from cache_cases import (
    LAYERS,
    Attend,
    D,
    G,
    H,
    assert_close,
    build,
    check_batches,
    check_room_for_everything_changes_nothing,
    check_sampling_and_conversation,
    emulated,
    ids,
    left_padding,
    run,
)
from fastok.sparse import H2OCache
from fastok.testing import assert_accurate, assert_same
from torch import Tensor

pytest.importorskip("transformers")

SHARP = {"initializer_range": 0.2}  # attention that prefers some tokens, whatever their age


def heavy_hitters(heavy: int, recent: int) -> Attend:
    """H2O's attention of one stream, lists per KV head."""
    keys: dict[int, list[Tensor]] = {}
    values: dict[int, list[Tensor]] = {}
    scores: dict[int, list[Tensor]] = {}

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, out = q.shape[1], []
        for store in (keys, values, scores):
            store.setdefault(layer, [k.new_zeros(0, D) if store is not scores else k.new_zeros(0)] * G)
        for group in range(G):
            mine = slice(group * (H // G), (group + 1) * (H // G))
            all_k = torch.cat([keys[layer][group], k[mine][0]])
            all_v = torch.cat([values[layer][group], v[mine][0]])
            total = len(all_k)
            logits = q[mine] @ all_k.mT * D**-0.5
            future = torch.arange(total) > torch.arange(total - n, total)[:, None]
            p = logits.masked_fill(future, -torch.inf).softmax(-1)
            out.append(p @ all_v)
            score = torch.cat([scores[layer][group], k.new_zeros(n)]) + p.sum((0, 1))
            kept = torch.arange(total)
            if total > heavy + recent:
                best = score[:-recent].sort(descending=True, stable=True).indices[:heavy].sort().values
                kept = torch.cat([best, kept[-recent:]])
            for store, x in ((keys, all_k), (values, all_v), (scores, score)):
                store[layer] = [x[kept] if one == group else old for one, old in enumerate(store[layer])]
        return torch.cat(out)

    return attend


@pytest.mark.parametrize("cuts", [(30, *range(31, 60)), (30, 32, 50), (10, 11, 59), (59,)])
@torch.no_grad()
def test_steps_attend_to_heavy_hitters_and_the_newest(cuts: tuple[int, ...]) -> None:
    model, tokens = build(**SHARP), ids(2, 60)
    got = run(model, H2OCache(8, 6), tokens, cuts)
    for row in range(2):
        wanted = emulated(model, tokens[row], cuts, heavy_hitters(8, 6))
        truth = emulated(build("eager", **SHARP).double(), tokens[row], cuts, heavy_hitters(8, 6))
        assert_accurate(got[row], truth, wanted, factor=6)


@torch.no_grad()
def test_scores_are_the_sums_of_all_probabilities() -> None:
    model, tokens = build(), ids(2, 50)
    cache = H2OCache(60, 4)
    run(model, cache, tokens, (40, 41, 43))
    with fastok.record_scores(fastok.ScoreSpec(heads="group_sum")) as recorded:
        model(tokens)
    for layer, scores in zip(cache.layers, recorded, strict=True):
        assert_close(layer.scores, scores[0], 2e-5)


@torch.no_grad()
def test_heads_keep_different_tokens_and_memory_shrinks() -> None:
    model, tokens, cache = build(**SHARP), ids(2, 300), H2OCache(20, 12)
    sizes = set()
    for end in (200, *range(201, 300)):
        model(tokens[:, cache.get_seq_length() : end], past_key_values=cache)
        sizes.add(cache.nbytes)
    of_head = (32 + 16) * 2 * D * 4 + 32 * (8 + 4)  # keys and values with room for 16 more, places, scores
    assert sizes == {LAYERS * 2 * G * of_head}
    kept = torch.stack([layer.kept for layer in cache.layers])
    assert kept.shape == (LAYERS, 2, G, 32)
    assert (kept[:, :, 0] != kept[:, :, 1]).any()
    assert (kept[..., 19] > 19 + 20).all()  # not simply the oldest
    assert_same(kept[..., -12:], torch.arange(287, 299).expand(LAYERS, 2, G, 12))
    assert bool((kept.diff() > 0).all())


@torch.no_grad()
def test_shares_are_of_the_prompt() -> None:
    cache = H2OCache()
    run(build(), cache, ids(1, 70), (50,))
    assert [layer.kv.length for layer in cache.layers] == [10] * LAYERS


@pytest.mark.parametrize("first", [0, 13])
@torch.no_grad()
def test_padding_goes_first_and_does_not_count(first: int) -> None:
    model, tokens, cuts = build(), ids(2, 44), (30, 31, 32, 36)
    mask = left_padding(tokens, 0, first)
    mask[1, 33:35] = 0  # and within a later call
    got = run(model, H2OCache(9, 12), tokens, cuts, mask)
    seen = mask[1].bool()
    shorter = tuple(int(seen[:cut].sum()) for cut in cuts)
    # Padding among the newest takes room there, so the last tokens have a smaller window than they would have alone.
    alone = run(model, H2OCache(9, 12), tokens[1:, seen], shorter)
    count = int(seen[:36].sum())
    assert_close(got[1:, seen][:, :count], alone[:, :count])
    assert_close(got[:1, :30], model(tokens[:1, :30]).logits)


@torch.no_grad()
def test_what_every_cache_can() -> None:
    check_room_for_everything_changes_nothing(lambda model: H2OCache(40, 20))
    check_batches(lambda model: H2OCache(8, 6))
    check_sampling_and_conversation(lambda model: H2OCache(8, 6))


@torch.no_grad()
def test_cropping() -> None:
    model, tokens = build(), ids(2, 50)
    cache = H2OCache(40, 10)
    run(model, cache, tokens[:, :40], (30,))
    cache.crop(-8)
    assert cache.get_seq_length() == 32
    assert_close(run(model, cache, tokens[:, 32:]), model(tokens).logits[:, 32:])
    cache = H2OCache(8, 6)
    run(model, cache, tokens[:, :20])
    with pytest.raises(NotImplementedError, match="evicted"):
        cache.crop(-1)


@torch.no_grad()
def test_half_precision() -> None:
    model, tokens, cuts = build().bfloat16(), ids(1, 40), (39,)
    got = run(model, H2OCache(40, 10), tokens, cuts)
    plain = build("eager").bfloat16()(tokens).logits
    assert_accurate(got, build("eager").double()(tokens).logits, plain, factor=3)


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (ValueError, "heavy must be above 0, got 0.0", lambda: H2OCache(0.0)),
        (ValueError, "recent must be >= 1, got 0", lambda: H2OCache(0.1, 0)),
        (TypeError, "heavy must be an int", lambda: H2OCache(1.5)),
        (NotImplementedError, "attn_implementation", lambda: run(build("sdpa"), H2OCache(4, 4), ids(1, 9))),
    ],
)
def test_refusals(error: type[Exception], message: str, make: Any) -> None:
    with pytest.raises(error, match=message), torch.no_grad():
        make()
