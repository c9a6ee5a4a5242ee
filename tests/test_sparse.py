"""Sparse decode: calibration of channels, label caches, label scores, token selection."""

import math

import fastok.ops.sparse
import hypothesis.strategies as st
import pytest
import torch
from fastok.caches.labels import LabelCache
from fastok.ops.sparse import calibrate_channels, label_scores, label_tokens, rotary_channels, select_tokens
from fastok.reference.sparse import fisher_sums, most_discriminating
from fastok.testing import Backend, assert_accurate, assert_same, over_backends
from hypothesis import given
from torch import Tensor

INF = math.inf


def chosen(row: list[float], k: int, mass: float | None, sink: int, recent: int, length: int) -> list[int]:
    """One head's selection, token by token."""
    forced = [t for t in range(length) if t < sink or t >= length - recent]
    rest = [t for t in range(length) if t not in forced]
    rest.sort(key=lambda t: (-(-INF if math.isnan(row[t]) else row[t]), t))
    forced.sort(key=lambda t: (-(-INF if math.isnan(row[t]) else row[t]), t))
    order = (forced + rest)[:k]
    if mass is None:
        return sorted(order)
    weight = [x if x > 0 else 0.0 for x in row[:length]]
    kept, total = [], 0.0
    for t in order:
        if t in forced or total < mass * sum(weight):
            kept.append(t)
        total += weight[t]
    return sorted(kept)


@over_backends("select_tokens")
@pytest.mark.parametrize("mass", [None, 0.5])
@given(data=st.data())
def test_selection_is_the_one_made_by_hand(backend: Backend, mass: float | None, data: st.DataObject) -> None:
    batch, heads, n = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    values = (
        st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, math.nan])
        if mass
        else st.sampled_from([-1.0, 0.0, 1.0, 3.0, -INF, math.nan])
    )
    scores = torch.tensor(data.draw(st.lists(values, min_size=batch * heads * n, max_size=batch * heads * n))).view(
        batch, heads, n
    )
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, n), min_size=batch, max_size=batch)))
    k = data.draw(st.integers(0, n))
    sink = data.draw(st.integers(0, k))
    recent = data.draw(st.integers(0, k - sink))
    index, count = backend.select_tokens(scores, k, mass, sink, recent, lengths)
    assert index.shape == (batch, heads, k)
    for b in range(batch):
        for h in range(heads):
            wanted = chosen(scores[b, h].tolist(), k, mass, sink, recent, int(lengths[b]))
            assert count[b, h] == len(wanted)
            assert index[b, h].tolist() == wanted + [-1] * (k - len(wanted))


SPREADS = {
    "normal": lambda n: torch.randn(n),
    "of one digit": lambda n: 1 + torch.rand(n) / 8,
    "few values": lambda n: torch.randint(-2, 3, (n,)).float(),
    "equal": lambda n: torch.full((n,), -0.5),
    "zeros and infinities": lambda n: torch.tensor([-math.inf, -0.0, 0.0, 1e-45, math.inf])[torch.randint(5, (n,))],
    "hardly any numbers": lambda n: torch.where(torch.rand(n) < 0.9, math.nan, torch.randn(n)),
}


@over_backends("select_tokens")
@pytest.mark.parametrize("spread", SPREADS)
def test_selection_among_many_tokens(backend: Backend, spread: str) -> None:
    n = 9001
    for k, sink, recent in ((700, 4, 64), (1, 0, 0), (9000, 1, 1), (9001, 0, 9001), (5000, 4500, 500)):
        scores = torch.stack([SPREADS[spread](n + 1) for _ in range(2)]).view(2, 1, n + 1)[..., 1:]
        lengths = torch.tensor([n, 5200], dtype=torch.int32)
        wanted = fastok.reference.sparse.select_tokens(scores, k, None, sink, recent, lengths)
        for name, got, expected in zip(
            ("index", "count"), backend.select_tokens(scores, k, None, sink, recent, lengths), wanted, strict=True
        ):
            assert_same(got, expected, f"{name} of k = {k}")


@over_backends("select_tokens")
def test_mass_of_many_tokens(backend: Backend) -> None:
    scores = torch.softmax(4 * torch.randn(2, 3, 3000), -1)
    lengths = torch.tensor([3000, 1234])
    for k, mass, sink, recent in ((3000, 0.9, 0, 0), (3000, 0.5, 4, 16), (40, 0.99, 4, 16), (3000, 0.001, 100, 100)):
        wanted = fastok.reference.sparse.select_tokens(scores, k, mass, sink, recent, lengths)
        for got, expected in zip(backend.select_tokens(scores, k, mass, sink, recent, lengths), wanted, strict=True):
            assert_same(got, expected, f"mass {mass}")


def test_selection_of_an_empty_cache_and_of_no_tokens() -> None:
    index, count = select_tokens(torch.zeros(2, 3, 0), 5)
    assert index.shape == (2, 3, 0)
    assert count.tolist() == [[0] * 3] * 2
    index, count = select_tokens(torch.zeros(1, 1, 4), 0)
    assert index.shape == (1, 1, 0)
    assert count.item() == 0


def test_unwritten_slots_never_win_over_negative_scores() -> None:
    scores = torch.tensor([[[-3.0, -1.0, -2.0, 0.0, 0.0]]])  # the last two are slots that hold no token
    index, count = select_tokens(scores, 2, seq_lens=torch.tensor([3]))
    assert index.tolist() == [[[1, 2]]]
    assert count.item() == 2


def test_mass_is_reached_by_the_fewest_tokens() -> None:
    scores = torch.tensor([[[0.125, 0.5, 0.125, 0.25]]])
    assert select_tokens(scores, mass=0.5)[0].tolist() == [[[1, -1, -1, -1]]]
    assert select_tokens(scores, mass=0.76)[0].tolist() == [[[0, 1, 3, -1]]]
    assert select_tokens(scores, mass=1.0)[1].item() == 4
    assert select_tokens(scores, 2, mass=1.0)[0].tolist() == [[[1, 3]]]


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "neither", {}),
        (ValueError, "mass", {"mass": 0.0}),
        (ValueError, "mass", {"mass": 1.5}),
        (TypeError, "mass must be a number", {"mass": "all"}),
        (ValueError, "k must be >= 0", {"k": -1}),
        (TypeError, "k must be an int", {"k": 2.0}),
        (ValueError, "room for sink", {"k": 3, "sink": 2, "recent": 2}),
        (ValueError, "seq_lens", {"k": 3, "seq_lens": torch.tensor([9])}),
        (ValueError, "seq_lens", {"k": 3, "seq_lens": torch.tensor([1, 1])}),
    ],
)
def test_selection_refuses(error: type[Exception], message: str, arguments: dict) -> None:
    with pytest.raises(error, match=message):
        select_tokens(torch.zeros(1, 2, 8), **arguments)


def listed(heads: int) -> torch.Tensor:
    """Lists of one channel each, channel 0."""
    return torch.zeros(heads, 1, dtype=torch.int64)


def keys(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


@pytest.mark.parametrize("per_query_head", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@over_backends("label_scores")
def test_all_channels_give_the_exact_products(backend: Backend, dtype: torch.dtype, per_query_head: bool) -> None:
    q, k = keys(2, 1, 6, 16, dtype=dtype), keys(2, 37, 3, 16, dtype=dtype)
    channels = torch.stack([torch.randperm(16) for _ in range(6 if per_query_head else 3)])
    labels = LabelCache(channels).append(k[:, :20]).append(k[:, 20:])
    repeated = k.repeat_interleave(2, 2)
    truth = torch.einsum("bshd,bthd->bht", q.double(), repeated.double())
    peer = torch.einsum("bshd,bthd->bht", q.float(), repeated.float())
    got = backend.label_scores(q, labels.data, labels.scale, channels, 3, False, None)
    assert_accurate(got, truth, peer)
    shared = backend.label_scores(q, labels.data, labels.scale, channels, 3, True, None)
    assert_same(shared, got.unflatten(1, (3, 2)).amax(2))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("r", [1, 4, 5])
def test_codes_are_within_half_a_step(bits: int, r: int) -> None:
    k, channels = keys(2, 33, 3, 16), torch.stack([torch.randperm(16)[:r] for _ in range(3)])
    labels = LabelCache(channels, bits)
    for part in k.split([1, 20, 12], 1):
        labels.append(part)
    wanted = k.transpose(1, 2).gather(3, channels[None, :, None].expand(2, -1, 33, -1)).transpose(2, 3)
    unpacked = fastok.reference.sparse.unpacked_labels(labels.data, labels.scale, r)
    step = wanted.abs().amax(2, keepdim=True) / (2 ** (bits - 1) - 1)
    assert bool(((unpacked - wanted).abs() <= 0.5 * step * 1.01 + 1e-6).all())
    assert len(labels) == 33


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("shared", [False, True])
@over_backends("label_scores")
def test_scores_of_any_number_of_tokens(backend: Backend, shared: bool, bits: int) -> None:
    for n in (1, 5, 16, 33, 100, 5000):
        q = keys(2, 2, 6, 16)
        channels = torch.stack([torch.randperm(16)[:5] for _ in range(6)])
        labels = LabelCache(channels, bits).append(keys(2, n, 3, 16))
        lengths = torch.tensor([n, n // 2])
        arguments = (channels, 3, shared, lengths)
        got = backend.label_scores(q, labels.data, labels.scale, *arguments)
        unpacked = fastok.reference.sparse.unpacked_labels(labels.data, labels.scale, 5)
        truth = fastok.reference.sparse.label_scores(q.double(), unpacked.double(), None, *arguments)
        peer = fastok.reference.sparse.label_scores(q, unpacked, None, *arguments)
        assert_accurate(got, truth, peer, name=f"{n} tokens")
        if n <= 100:  # rows that begin anywhere
            dense = [None if x is None else x.contiguous() for x in (labels.data, labels.scale)]
            assert_same(backend.label_scores(q, *dense, channels, 3, shared, lengths.int()), got)


def test_several_rows_count_by_their_largest_and_lengths_hide_the_rest() -> None:
    q, k = keys(2, 3, 4, 8), keys(2, 10, 2, 8)
    labels = LabelCache(torch.arange(8).expand(2, 8)).append(k)
    lengths = torch.tensor([10, 4])
    got = label_scores(q, labels, shared=False, seq_lens=lengths)
    single = torch.stack([label_scores(q[:, i], labels, shared=False) for i in range(3)]).amax(0)
    assert_same(got[0], single[0])
    assert_same(got[1, :, :4], single[1, :, :4])
    assert bool((got[1, :, 4:] == -INF).all())


@pytest.mark.parametrize("bits", [16, 4])
def test_the_sum_of_a_group(bits: int) -> None:
    q, k = keys(2, 1, 6, 8), keys(2, 10, 2, 8)
    labels = LabelCache(torch.stack([torch.randperm(8)[:3] for _ in range(6)]), bits).append(k)
    lengths = torch.tensor([10, 4])
    single = label_scores(q, labels, shared=False, seq_lens=lengths)
    assert_same(label_scores(q, labels, shared="sum", seq_lens=lengths), single.unflatten(1, (2, 3)).sum(2))
    with pytest.raises(ValueError, match="shared must be True"):
        label_scores(q, labels, shared="mean")


@over_backends("label_scores")
@pytest.mark.parametrize("heads", [1, 3, 5, 8])
def test_nan_and_infinite_products_of_any_head_are_seen(backend: Backend, heads: int) -> None:
    """One list per KV head: a NaN of any query head of the group wins, as in amax; infinities are numbers."""
    n = 100
    q, k = torch.rand(1, 1, heads, 8) + 0.5, torch.rand(1, n, 1, 8) + 0.5
    for t in range(0, n, 7):
        k[0, t, 0, 0] = (math.inf, -math.inf, math.nan)[t % 3]
    q[0, 0, heads // 2, 0] *= -1
    labels = LabelCache(torch.arange(8)[None]).append(k)
    got = backend.label_scores(q, labels.data, None, labels.channels, 1, True, None)
    single = backend.label_scores(q, labels.data, None, labels.channels, 1, False, None)
    assert_same(got, single.amax(1, keepdim=True))
    assert bool(got.isnan().any())
    assert bool(got.isinf().any())


def test_a_nan_key_stays_with_its_token() -> None:
    k = keys(1, 6, 1, 8)
    k[0, 2, 0, 3] = math.nan
    for bits in (16, 8, 4):
        scores = label_scores(keys(1, 1, 2, 8), LabelCache(torch.arange(8)[None], bits).append(k))
        assert scores[0, 0].isnan().tolist() == [t == 2 for t in range(6)]
        index, _ = select_tokens(scores, 5)
        assert 2 not in index.tolist()[0][0]


def test_cropping_and_reordering() -> None:
    k, more = keys(3, 9, 2, 8), keys(3, 5, 2, 8)
    labels = LabelCache(torch.tensor([[0, 3], [7, 1]]), 8).append(k)
    labels.crop(4)
    labels.select(torch.tensor([2, 2, 0]))
    labels.append(more)
    other = LabelCache(torch.tensor([[0, 3], [7, 1]]), 8).append(torch.cat([k[[2, 2, 0], :4], more], 1))
    assert_same(labels.data, other.data)
    assert_same(labels.scale, other.scale)


def test_appending_allocates_seldom_and_memory_is_told() -> None:
    labels = LabelCache(torch.tensor([[0, 3], [7, 1]]), 4)
    addresses = set()
    for _ in range(100):
        labels.append(keys(1, 1, 2, 8))
        addresses.add(labels.data.data_ptr())
    assert len(addresses) < 15
    capacity = labels._data.shape[-1]
    assert labels.nbytes == 4 * 8 + 2 * 1 * capacity + 2 * 2 * capacity


@pytest.mark.parametrize("statistic", ["q", "k", "qk"])
def test_calibration_finds_the_planted_channels(statistic: str) -> None:
    q, k = keys(2, 50, 4, 8), keys(2, 50, 2, 8)
    for head in range(4):
        q[:, :, head, head] *= 100
    for head in range(2):
        k[:, :, head, 7 - head] *= 100
    channels = calibrate_channels(q, k, 2, statistic=statistic)
    assert channels.dtype == torch.int64
    if statistic == "q":
        assert channels[:, 0].tolist() == [0, 1, 2, 3]
    elif statistic == "k":
        assert channels[:, 0].tolist() == [7, 6]
    else:
        assert [set(row) for row in channels.tolist()] == [{0, 7}, {1, 7}, {2, 6}, {3, 6}]


def test_channels_of_the_other_rotary_layout() -> None:
    """Pairs that turn together stay pairs, there and back; of keys laid out anew they make the same scores."""
    halves = torch.arange(8)
    other = rotary_channels(halves, 8)
    assert other.tolist() == [(2 * c) % 8 + 2 * c // 8 for c in range(8)]  # as published
    assert [set(pair) for pair in zip(other[:4].tolist(), other[4:].tolist(), strict=True)] == [
        {2 * i, 2 * i + 1} for i in range(4)
    ]
    channels = torch.stack([torch.randperm(16)[:5] for _ in range(2)])
    moved = rotary_channels(channels, 16)
    assert_same(rotary_channels(moved, 16, to="halves"), channels)
    q, k = keys(1, 1, 4, 16), keys(1, 9, 2, 16)
    place = rotary_channels(torch.arange(16), 16)
    laid_out = [torch.empty_like(x).index_copy_(3, place, x) for x in (q, k)]
    assert_same(
        label_scores(laid_out[0], LabelCache(moved).append(laid_out[1])),
        label_scores(q, LabelCache(channels).append(k)),
    )


def test_statistics_before_and_after_rotary_embedding_choose_otherwise() -> None:
    """Products of turned queries and keys see how they lie to each other, the published |q| and |k| do not."""
    q, k = torch.zeros(2, 1, 16, 1, 4)
    q[..., 0], k[..., 2] = 3.0, 3.0  # one pair that turns together: apart before, a product after
    q[..., 1], k[..., 1] = 1.0, 1.0
    angle = torch.arange(16.0)[None, :, None, None] * torch.tensor([1.0, 0.01])

    def turned(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    assert calibrate_channels(q, k, 1, statistic="q").tolist() == [[0]]
    assert calibrate_channels(q, k, 1, statistic="k").tolist() == [[2]]
    assert calibrate_channels(q, k, 1).tolist() == [[1]]
    assert set(calibrate_channels(turned(q), turned(k), 2)[0].tolist()) == {0, 2}


def test_calibration_takes_the_lowest_of_equal_channels() -> None:
    ones = torch.ones(1, 3, 2, 8)
    assert calibrate_channels(ones, ones, 3).tolist() == [[0, 1, 2]] * 2


def fisher_ratio(q: Tensor, k: Tensor, head: int, channels: list[int]) -> float:
    """Of one head's labels in these channels, query by query."""
    gap, variance, tokens = 0.0, 0.0, q.shape[1]
    eighth = max(1, math.ceil(tokens / 8))
    for row in range(q.shape[0]):
        own, kept = q[row, :, head].double(), k[row, :, head * k.shape[2] // q.shape[2]].double()
        for t in range(tokens):
            distant = t // eighth * eighth
            if distant == 0:
                continue
            attention = (kept[: t + 1] @ own[t] * own.shape[1] ** -0.5).softmax(0)[:distant]
            label = kept[:distant, channels] @ own[t, channels]
            gap += float((attention * (label - label.mean())).sum())
            variance += float(label.var(correction=0))
    return gap * abs(gap) / variance


@pytest.mark.parametrize(("tokens", "kv_heads"), [(3, 4), (17, 2), (40, 1)])
def test_fisher_takes_the_channels_that_make_the_ratio_largest(tokens: int, kv_heads: int) -> None:
    q, k = 2 * keys(2, tokens, 4, 6), keys(2, tokens, kv_heads, 6)
    channels = calibrate_channels(q, k, 4, statistic="fisher")
    assert channels.shape == (4, 4)
    for head, found in enumerate(channels.tolist()):
        for place, channel in enumerate(found):
            ratios = {c: fisher_ratio(q, k, head, [*found[:place], c]) for c in range(6) if c not in found[:place]}
            assert ratios[channel] >= max(ratios.values()) * (1 - 1e-9)


def test_fisher_passes_over_large_channels_that_tell_no_key_from_another() -> None:
    tokens, generator = 96, torch.Generator().manual_seed(0)
    k = torch.zeros(2, tokens, 1, 16)
    k[..., :4] = 10  # every key alike
    k[..., 4:8] = 6 * torch.randn(2, tokens, 1, 4, generator=generator)  # keys differ, but no query asks for it
    k[..., 8:12] = torch.randn(2, tokens, 1, 4, generator=generator)
    q = torch.zeros(2, tokens, 1, 16)
    q[..., :4] = 10
    q[..., 4:8] = torch.randn(2, tokens, 1, 4, generator=generator) / 4
    earlier = (torch.rand(2, tokens, generator=generator) * torch.arange(tokens)).long()
    q[..., 8:12] = 8 * k[..., 8:12].gather(1, earlier[:, :, None, None].expand(-1, -1, 1, 4))
    assert set(calibrate_channels(q, k, 4, statistic="fisher")[0].tolist()) == {8, 9, 10, 11}
    assert set(calibrate_channels(q, k, 4, statistic="qk")[0].tolist()) == {0, 1, 2, 3}


def test_fisher_puts_nan_last_and_takes_the_lowest_of_equal_channels() -> None:
    q, k = keys(1, 24, 2, 5), keys(1, 24, 2, 5)
    same = torch.ones(1, 24, 2, 5)
    assert calibrate_channels(same, same, 3, statistic="fisher").tolist() == [[0, 1, 2]] * 2
    assert calibrate_channels(q[:, :1], k[:, :1], 3, statistic="fisher").tolist() == [[0, 1, 2]] * 2
    assert calibrate_channels(q[:0], k[:0], 3, statistic="fisher").tolist() == [[0, 1, 2]] * 2
    sums = fisher_sums(q, k)
    sums[:, :, 1] = sums[:, 2, :] = math.nan
    channels = most_discriminating(sums, 5)
    assert channels.sort().values.tolist() == [list(range(5))] * 2
    assert channels[:, 4].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "r must be within", lambda q, k: calibrate_channels(q, k, 9)),
        (ValueError, "statistic", lambda q, k: calibrate_channels(q, k, 2, statistic="v")),
        (ValueError, "multiple", lambda q, k: calibrate_channels(q[:, :, :3], k, 2)),
        (ValueError, "k must have shape", lambda q, k: calibrate_channels(q, k[:, :2], 2)),
        (ValueError, "head_dim must be", lambda q, k: rotary_channels(listed(1), 7)),
        (ValueError, "to must be", lambda q, k: rotary_channels(listed(1), 8, to="back")),
        (ValueError, "channels must be within", lambda q, k: rotary_channels(listed(1) + 8, 8)),
        (TypeError, "channels must have dtype", lambda q, k: rotary_channels(listed(1).int(), 8)),
        (ValueError, "bits", lambda q, k: LabelCache(listed(1), 3)),
        (TypeError, "channels", lambda q, k: LabelCache(torch.zeros(1, 1))),
        (ValueError, "channels must be within", lambda q, k: LabelCache(torch.full((2, 1), 8)).append(k)),
        (
            ValueError,
            "channels must be of a multiple",
            lambda q, k: LabelCache(listed(3)).append(k),
        ),
        (RuntimeError, "empty", lambda q, k: label_scores(q, LabelCache(listed(2)))),
        (
            ValueError,
            "q must have",
            lambda q, k: label_scores(q[..., :4], LabelCache(listed(2)).append(k)),
        ),
        (TypeError, "k must have dtype float32", lambda q, k: LabelCache(listed(2), 8).append(k).append(k.half())),
        (TypeError, "q must be a tensor", lambda q, k: label_scores(None, LabelCache(listed(2)).append(k))),
        (TypeError, "labels must be", lambda q, k: label_scores(q, k)),
        (
            TypeError,
            "seq_lens must have dtype",
            lambda q, k: label_scores(q, LabelCache(listed(2)).append(k), seq_lens=torch.ones(1)),
        ),
        (
            ValueError,
            "seq_lens must be within",
            lambda q, k: label_scores(q, LabelCache(listed(2)).append(k), seq_lens=torch.tensor([-1])),
        ),
    ],
)
def test_refusals_name_the_argument(error: type[Exception], message: str, call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call(keys(1, 5, 4, 8), keys(1, 5, 2, 8))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("shared", "bits"), [(True, 16), (True, 8), (False, 4)])
@over_backends("label_tokens", without=("reference", "triton-interpreter", "cuda-on-host"))
def test_tokens_are_those_with_the_best_scores(backend: Backend, shared: bool, bits: int, threads: int) -> None:
    """Whether a thread has heads of its own or shares one: NaN, infinities and ties as in the two ops."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for n in (1, 5, 33, 5000, 9001):
            q = keys(2, 2, 6, 16).round()
            k = keys(2, n, 3, 16).round()
            k[0, n // 2, 0] = math.nan
            k[1, n // 3, 1, 0] = math.inf
            channels = torch.stack([torch.randperm(16)[:5] for _ in range(3)])
            labels = LabelCache(channels, bits).append(k)
            lengths = torch.tensor([n, n // 2])
            arguments = (q, labels.data, labels.scale, channels, 3, shared)
            scores = backend.label_scores(*arguments, lengths)
            for k_most, sink, recent in ((0, 0, 0), (1, 0, 1), (n // 3 + 4, 3, 1), (n, 1, 2)):
                chosen = (min(k_most, n), sink, recent, lengths)
                if chosen[0] < min(n, sink + recent):
                    continue
                wanted = backend.select_tokens(scores, chosen[0], None, *chosen[1:])
                for got, part in zip(backend.label_tokens(*arguments, *chosen), wanted, strict=True):
                    assert_same(got, part, name=f"{n} tokens, {chosen}")
    finally:
        torch.set_num_threads(before)


def test_tokens_by_labels_refuses_what_its_parts_refuse() -> None:
    labels = LabelCache(torch.tensor([[0, 3], [7, 1]])).append(keys(2, 9, 2, 8))
    q = keys(2, 1, 4, 8)
    with pytest.raises(ValueError, match="k must have room for sink"):
        label_tokens(q, labels, 3, sink=2, recent=2)
    with pytest.raises(ValueError, match="seq_lens must be within"):
        label_tokens(q, labels, 3, seq_lens=torch.tensor([9, 10]))
    with pytest.raises(ValueError, match="shared must be True"):
        label_tokens(q, labels, 3, shared="mean")
    with pytest.raises(ValueError, match="q must have"):
        label_tokens(q[..., :4], labels, 3)
    for shared in (True, False, "sum"):
        lengths = torch.tensor([9, 4])
        scores = label_scores(q, labels, shared=shared, seq_lens=lengths)
        wanted = select_tokens(scores, 5, sink=1, recent=2, seq_lens=lengths)
        got = label_tokens(q, labels, 5, sink=1, recent=2, shared=shared, seq_lens=lengths)
        for x, y in zip(got, wanted, strict=True):
            assert_same(x, y)


@pytest.mark.parametrize("op", ["label_scores", "select_tokens", "label_tokens"])
def test_opcheck(op: str) -> None:
    channels = torch.tensor([[0, 3, 5], [7, 1, 2]])
    labels = LabelCache(channels, 4).append(keys(2, 9, 2, 8))
    arguments = {
        "label_scores": (keys(2, 1, 4, 8), labels.data, labels.scale, channels, 2, True, torch.tensor([9, 3])),
        "select_tokens": (torch.rand(2, 3, 9), 4, 0.5, 1, 1, torch.tensor([9, 3])),
        "label_tokens": (keys(2, 1, 4, 8), labels.data, labels.scale, channels, 2, True, 4, 1, 1, torch.tensor([9, 3])),
    }
    torch.library.opcheck(getattr(torch.ops.fastok, op).default, arguments[op])


def test_compiles_without_graph_breaks() -> None:
    labels = LabelCache(torch.tensor([[0, 3], [7, 1]])).append(keys(2, 64, 2, 8))

    def step(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return select_tokens(label_scores(q, labels), 8, sink=1, recent=2)

    q = keys(2, 1, 4, 8)
    for got, wanted in zip(torch.compile(step, fullgraph=True)(q), step(q), strict=True):
        assert_same(got, wanted)
