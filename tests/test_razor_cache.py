"""``RazorCache`` and ``retrieval_heads``: what is gone counts as so many copies of its mean."""

from typing import Any

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
from fastok.caches.window import Gone
from fastok.integrations.razor_cache import RunningMean
from fastok.sparse import RazorCache, retrieval_heads
from fastok.testing import assert_accurate, assert_same
from torch import Tensor

transformers = pytest.importorskip("transformers")

SHARP = {"initializer_range": 0.2}  # attention that prefers some tokens
HEADS = torch.tensor([[True, False], [False, False], [False, True], [True, True]])
NONE = torch.zeros(LAYERS, G, dtype=torch.bool)


def razor(sink: int, recent: int) -> Attend:
    """RazorAttention of one stream, with the copies of the mean written out."""
    stored: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        new, before = q.shape[1], 0
        if layer in stored:
            before = stored[layer][0].shape[1]
            k, v = (torch.cat([old, x], 1) for old, x in zip(stored[layer], (k, v), strict=True))
        stored[layer] = k, v
        total, rows = k.shape[1], []
        future = torch.arange(total) > torch.arange(before, total)[:, None]
        for head in range(H):
            keys, values, hidden = k[head], v[head], future
            gone = (total if new == 1 else before) - recent
            if before and gone > sink and not HEADS[layer, head // (H // G)]:
                many = gone - sink
                parts = (torch.cat([x[:sink], x[sink:gone].mean(0).expand(many, -1), x[gone:]]) for x in (keys, values))
                keys, values = parts
            rows.append((q[head] @ keys.mT * D**-0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ values)
        return torch.stack(rows)

    return attend


@pytest.mark.parametrize("cuts", [(40, *range(41, 70)), (40, 43, 44, 62), (1, 2, 40), (5, 69)])
@torch.no_grad()
def test_what_is_gone_counts_as_copies_of_its_mean(cuts: tuple[int, ...]) -> None:
    model, tokens = build(**SHARP), ids(2, 70)
    got = run(model, RazorCache(HEADS, sink=3, recent=12, share=100), tokens, cuts)
    for row in range(2):
        wanted = emulated(model, tokens[row], cuts, razor(3, 12))
        truth = emulated(build("eager", **SHARP).double(), tokens[row], cuts, razor(3, 12))
        assert_accurate(got[row], truth, wanted, factor=6)


def test_equal_tokens_lose_nothing_however_many() -> None:
    for count in (1, 7, 10**6):
        k, v, q = torch.randn(1, 2, 1, D), torch.randn(1, 2, 1, D), torch.randn(1, 3, 4, D)
        mean = RunningMean(k.half(), v.half())
        for part in (count // 3, count - count // 3):
            there = torch.ones(1, 1, dtype=torch.bool).expand(1, part)
            mean.add(Gone(k.half().expand(-1, -1, part, -1), v.half().expand(-1, -1, part, -1), there))
        assert int(mean.count) == count
        out, lse = mean.attend(q, 0.25, None)
        logits = (q * k.half().float().transpose(1, 2).repeat_interleave(2, 2)).sum(-1).transpose(1, 2) * 0.25
        assert_close(lse, logits + torch.tensor(float(count)).log(), 1e-4)
        assert_close(out, v.half().float().transpose(1, 2).repeat_interleave(2, 2).expand(1, 3, 4, D), 1e-4)


@torch.no_grad()
def test_the_mean_runs_over_tokens_that_are_no_sinks_and_no_padding() -> None:
    model, tokens = build(), ids(2, 90)
    mask = left_padding(tokens, 0, 33)
    cache, dense = RazorCache(NONE, sink=3, recent=12, share=100), transformers.DynamicCache()
    run(model, cache, tokens, (60, 61, 62, 80), mask)
    run(model, dense, tokens, (60,), mask)
    layer, whole = cache.layers[0], dense.layers[0]  # the first layer's keys do not depend on attention
    for row, first in enumerate((0, 33)):
        gone = slice(first + 3, 90 - 12)
        assert int(layer.mean.count[row]) == 90 - 12 - 3 - first
        assert_close(layer.mean.k[row], whole.keys[row, :, gone].mean(1))
        assert_close(layer.mean.v[row], whole.values[row, :, gone].mean(1))
        assert_same(layer.window.sink_column[row], torch.arange(first, first + 3))


@torch.no_grad()
def test_padded_samples_are_what_they_are_alone() -> None:
    model, tokens, cuts = build(**SHARP), ids(2, 60), (30, 31, 32, 50)
    mask = left_padding(tokens, 0, 11)
    make = lambda: RazorCache(HEADS, sink=3, recent=8, share=100)  # noqa: E731
    got = run(model, make(), tokens, cuts, mask)
    assert_close(got[1:, 11:], run(model, make(), tokens[1:, 11:], tuple(cut - 11 for cut in cuts)), 5e-5)
    assert_close(got[:1], run(model, make(), tokens[:1], cuts), 5e-5)


@torch.no_grad()
def test_the_window_is_a_share_of_the_prompt_and_memory_shrinks() -> None:
    model, cache = build(), RazorCache(NONE, sink=4, recent=10, share=5)
    run(model, cache, ids(2, 200))
    before = cache.nbytes
    assert [layer.window.recent for layer in cache.layers] == [40] * LAYERS
    window, mean = 2 * G * 44 * D * 2 * 4 + 2 * 4 * 8, 2 * G * D * 2 * 4 + 2 * 8
    assert before == LAYERS * (window + mean)
    run(model, cache, ids(2, 30), tuple(range(1, 30)))
    assert cache.nbytes == before
    some = RazorCache(HEADS, sink=4, recent=10, share=5)
    run(model, some, ids(2, 200))
    dense = LAYERS * 2 * G * 200 * D * 2 * 4
    assert dense / 2 < some.nbytes < dense * 0.7  # half of the heads, and a little


@torch.no_grad()
def test_what_every_cache_can() -> None:
    check_room_for_everything_changes_nothing(lambda model: RazorCache(HEADS))
    for heads in (HEADS, ~NONE, NONE):
        check_batches(lambda model, heads=heads: RazorCache(heads, sink=2, recent=6, share=100))
    check_sampling_and_conversation(lambda model: RazorCache(HEADS, sink=2, recent=6))


@torch.no_grad()
def test_cropping() -> None:
    model, tokens = build(), ids(2, 50)
    for length in (35, 12, 3):
        cache = RazorCache(HEADS, sink=4, recent=40)
        run(model, cache, tokens[:, :44], (30,))
        cache.crop(length - 44)
        assert_close(run(model, cache, tokens[:, length:44]), model(tokens[:, :44]).logits[:, length:])
    run(model, cache, tokens[:, 44:])
    with pytest.raises(NotImplementedError, match="crop"):
        cache.crop(-1)


@torch.no_grad()
def test_half_precision() -> None:
    model, tokens, cuts = build().bfloat16(), ids(1, 70), (40, *range(41, 70))
    got = run(model, RazorCache(HEADS, sink=3, recent=12, share=100), tokens, cuts)[0]
    plain = emulated(build("eager").bfloat16(), tokens[0], cuts, razor(3, 12))
    assert_accurate(got, emulated(build("eager").double(), tokens[0], cuts, razor(3, 12)), plain, factor=3)


# ---- retrieval heads -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_retrieval_heads_are_those_that_attend_to_the_diagonals() -> None:
    model = build(**SHARP)
    tokens = torch.randint(64, (1, 25), generator=torch.Generator().manual_seed(0)).repeat(1, 4)
    attentions = build("eager", **SHARP)(tokens, output_attentions=True).attentions
    induction, echo = [], []
    for p in attentions:
        for scores, ahead in ((echo, 0), (induction, 1)):
            pairs = [(i, i - m * 25 + ahead) for i in range(100) for m in range(1, i // 25 + 1)]
            of_head = torch.stack([p[0, :, i, j] for i, j in pairs]).mean(0)
            scores.append(of_head.view(G, H // G).amax(1))
    got = retrieval_heads(model, induction=0.25, echo=0.1, length=25)
    wanted = torch.zeros(LAYERS * G, dtype=torch.bool)
    wanted[torch.cat(induction).topk(2).indices] = True
    wanted[torch.cat(echo).topk(1).indices] = True
    assert_same(got, wanted.view(LAYERS, G))
    assert_same(retrieval_heads(model, induction=1.0, length=10), torch.ones(LAYERS, G, dtype=torch.bool))
    assert int(retrieval_heads(model, induction=0.0, echo=0.0, length=10).sum()) == 0
    run(model, RazorCache(got, recent=9), ids(1, 20), (10,))  # the model is what it was


@torch.no_grad()
def test_a_head_made_to_look_back_is_found() -> None:
    model = build(num_hidden_layers=2)
    # Layer 1's KV head 1 compares token embeddings, almost without positions: an echo head.
    attention = model.model.layers[1].self_attn
    slow = torch.tensor([6, 7, 14, 15])  # channels that turn least
    reader = torch.linalg.qr(torch.randn(64, 64)).Q[:4] * 60
    for project, first in ((attention.q_proj, 2 * D), (attention.q_proj, 3 * D), (attention.k_proj, D)):
        project.weight[first : first + D] = 0
        project.weight[first + slow] = reader
    got = retrieval_heads(model, induction=0.0, echo=0.2, length=20)
    assert_same(got.nonzero(), torch.tensor([[1, 1]]))


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (TypeError, "heads must be a bool tensor", lambda: RazorCache([[1, 0]])),
        (TypeError, "heads must be a bool tensor", lambda: RazorCache(torch.ones(2, 2))),
        (ValueError, "sink must be >= 0", lambda: RazorCache(HEADS, sink=-1)),
        (ValueError, "recent must be >= 1", lambda: RazorCache(HEADS, recent=0)),
        (ValueError, "share must be >= 1", lambda: RazorCache(HEADS, share=0)),
        (ValueError, "heads must have a row for every layer", lambda: run(build(), RazorCache(HEADS[:2]), ids(1, 9))),
        (ValueError, "heads must have a column", lambda: run(build(), RazorCache(HEADS[:, :1]), ids(1, 9))),
        (NotImplementedError, "attn_implementation", lambda: run(build("sdpa"), RazorCache(HEADS), ids(1, 9))),
        (
            NotImplementedError,
            "sliding_window: required, 8",
            lambda: run(build(kind="Mistral", sliding_window=8), RazorCache(HEADS), ids(1, 2), (1,)),
        ),
        (ValueError, "echo must be within", lambda: retrieval_heads(build(), echo=2.0)),
        (ValueError, "repeats must be >= 2", lambda: retrieval_heads(build(), repeats=1)),
        (TypeError, "model must have attention layers", lambda: retrieval_heads(torch.nn.Linear(2, 2))),
    ],
)
def test_refusals(error: type[Exception], message: str, make: Any) -> None:
    with pytest.raises(error, match=message), torch.no_grad():
        make()


def test_heads_that_keep_everything_heed_sliding_windows() -> None:
    model, tokens, every = build(kind="Mistral", sliding_window=8), ids(2, 30), torch.ones(LAYERS, G, dtype=torch.bool)
    with torch.no_grad():
        got = run(model, RazorCache(every, recent=2), tokens, tuple(range(20, 30)))
        wanted = run(model, transformers.DynamicCache(), tokens, tuple(range(20, 30)))
    assert_close(got, wanted)
