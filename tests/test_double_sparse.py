"""``double_sparse_decode``: the tokens that labels choose, and exact attention to them."""

import math

import pytest
import torch
from fastok import PagedKV, attention_decode, kv_pack
from fastok.sparse import LabelCache, double_sparse_decode, label_scores, select_tokens
from fastok.testing import Backend, assert_accurate, assert_same, over_backends
from fastok.testing.examples import examples
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

H, G, D = 8, 2, 32
F64, F32 = torch.float64, torch.float32


def made(batch: int, tokens: int, rows: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(batch, rows, H, D).to(dtype)
    k, v = torch.randn(2, batch, tokens, G, D).to(dtype)
    return q, k, v


def channels(r: int, heads: int = G) -> Tensor:
    return torch.stack([torch.randperm(D)[:r] for _ in range(heads)])


def by_hand(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, lengths: list[int]) -> Tensor:
    """Softmax over the listed tokens, in the dtype of its inputs; causal among the newest rows."""
    batch, rows = q.shape[:2]
    out = torch.zeros_like(q)
    for b in range(batch):
        for h in range(H):
            group = h * G // H
            listed = tokens[b, h * tokens.shape[1] // H]
            for s in range(rows):
                own = listed[(listed >= 0) & (listed < lengths[b] - rows + 1 + s)]
                logits = (k[b, own, group] @ q[b, s, h]) * D**-0.5
                out[b, s, h] = logits.softmax(0) @ v[b, own, group]
    return out


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attends_to_the_tokens_with_the_best_scores(dtype: torch.dtype, shared: bool, rows: int) -> None:
    q, k, v = made(2, 90, rows, dtype)
    lengths = torch.tensor([90, 40])
    labels = LabelCache(channels(4)).append(k)
    out, _, tokens = double_sparse_decode(q, (k, v, lengths), labels, 12, sink=2, recent=4, shared=shared)
    assert tokens.shape == (2, G if shared else H, 12)
    scores = label_scores(q, labels, shared=shared, seq_lens=lengths)
    for b, length in enumerate(lengths.tolist()):
        for row, listed in zip(scores[b], tokens[b], strict=True):
            forced = {0, 1, *range(length - 4, length)}
            assert forced <= set(listed.tolist())
            others = [t for t in listed.tolist() if t not in forced]
            rest = row[[t for t in range(length) if t not in listed.tolist()]]
            assert row[others].min() >= rest.max()
    truth = by_hand(q.double(), k.double(), v.double(), tokens, lengths.tolist())
    assert_accurate(out, truth, by_hand(q, k, v, tokens, lengths.tolist()))


@pytest.mark.parametrize("shared", [True, False])
def test_as_many_as_there_are_is_dense_attention(shared: bool) -> None:
    q, k, v = made(3, 70, 2)
    lengths = torch.tensor([70, 9, 33])
    labels = LabelCache(channels(2)).append(k)
    out, _, tokens = double_sparse_decode(q, (k, v, lengths), labels, 70, shared=shared)
    for b, length in enumerate(lengths.tolist()):
        for listed in tokens[b].tolist():
            assert listed == [*range(length), *[-1] * (70 - length)]
    truth, peer = (by_hand(*(x.to(dtype) for x in (q, k, v)), tokens, lengths.tolist()) for dtype in (F64, F32))
    assert_accurate(out, truth, peer)
    # One long sequence does not make the short ones inexact.
    out, _, _ = double_sparse_decode(q, (k, v, lengths), labels, 40, shared=shared)
    assert_accurate(out[1:], truth[1:], peer[1:])


@pytest.mark.parametrize("shared", [True, "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_many_as_there_are_is_dense_decode_bit_for_bit(dtype: torch.dtype, shared: bool | str) -> None:
    q, k, v = made(2, 5000, 2, dtype)
    lengths = torch.tensor([5000, 2100])
    labels = LabelCache(channels(2), 8).append(k)
    out, lse, tokens = double_sparse_decode(q, (k, v, lengths), labels, 6000, shared=shared)
    for got, wanted in zip((out, lse), attention_decode(q, (k, v, lengths)), strict=True):
        assert_same(got, wanted)
    assert tokens.shape == (2, G, 5000)


@pytest.mark.parametrize("width", [8, 64])
def test_values_of_another_width_than_keys(width: int) -> None:
    q, k, _ = made(2, 90)
    v = torch.randn(2, 90, G, width)
    labels = LabelCache(channels(4)).append(k)
    lengths = torch.tensor([90, 7])
    out, _, tokens = double_sparse_decode(q, (k, v, lengths), labels, 12)
    assert out.shape == (2, 1, H, width)
    results = []
    for dtype in (F64, F32):
        wide = torch.zeros(2, 90, G, 64, dtype=dtype)
        wide[..., :width] = v
        parts = (by_hand(q.to(dtype), k.to(dtype), part, tokens, lengths.tolist()) for part in wide.split(D, 3))
        results.append(torch.cat(list(parts), 3)[..., :width])
    assert_accurate(out, *results)


def test_all_channels_choose_the_tokens_with_the_largest_logits() -> None:
    q, k, v = made(1, 60)
    labels = LabelCache(channels(D)).append(k)
    _, _, tokens = double_sparse_decode(q, (k, v, None), labels, 10, shared=False)
    exact = torch.einsum("hd,thd->ht", q[0, 0], k[0].repeat_interleave(H // G, 1))
    for row, listed in zip(exact, tokens[0], strict=True):
        best = row[:-1].topk(9).indices.tolist()  # and the newest
        assert sorted([*best, 59]) == listed.tolist()


def test_negative_scores_lose_to_nothing_that_is_not_there() -> None:
    k, v = torch.randn(2, 1, 64, G, D)
    q = -torch.ones(1, 1, H, D)
    k = k.abs()  # all products are negative, those of empty slots are 0
    lengths = torch.tensor([20])
    k[:, 20:] = 0
    labels = LabelCache(channels(3)).append(k)
    _, _, tokens = double_sparse_decode(q, (k, v, lengths), labels, 8)
    assert int(tokens.max()) == 19
    assert int(tokens.min()) >= 0


@pytest.mark.parametrize(("bits", "rows"), [(8, "kivi-4"), (4, "kivi-2")])
def test_packed_and_paged_caches_give_what_their_rows_give(bits: int, rows: str) -> None:
    q, k, v = made(2, 300)
    labels = LabelCache(channels(4), bits).append(k)
    packed = kv_pack(k, v, rows)
    unpacked = packed.unpack()
    got = double_sparse_decode(q, packed, labels, 32, sink=1, recent=8)
    lengths = [300, 300]
    truth, peer = (by_hand(q.to(dtype), *(x.to(dtype) for x in unpacked), got[2], lengths) for dtype in (F64, F32))
    assert_accurate(got[0], truth, peer)
    pages = torch.randperm(10).view(2, 5).int()
    store = torch.full((10, 60, G, D), math.nan).repeat(2, 1, 1, 1, 1)
    for x, whole in zip(store, (k, v), strict=True):
        x[pages.flatten().long()] = whole.reshape(10, 60, G, D)
    paged = PagedKV(store[0], store[1], pages, torch.tensor([300, 300]))
    again = double_sparse_decode(q, paged, labels, 32, sink=1, recent=8)
    assert_same(again[2], got[2])
    truth, peer = (by_hand(*(x.to(dtype) for x in (q, k, v)), got[2], lengths) for dtype in (F64, F32))
    assert_accurate(again[0], truth, peer)


def test_the_batch_changes_nothing() -> None:
    q, k, v = made(4, 80)
    picked, lengths = channels(4), torch.tensor([80, 30, 66, 12])
    together = double_sparse_decode(q, (k, v, lengths), LabelCache(picked).append(k), 16)
    for b in range(4):
        one = slice(b, b + 1)
        alone = double_sparse_decode(q[one], (k[one], v[one], lengths[one]), LabelCache(picked).append(k[one]), 16)
        for x, y in zip(alone, together, strict=True):
            assert_same(x, y[one])


def test_labels_of_four_bits_and_rows_of_two_are_a_fortieth_of_what_dense_attention_reads() -> None:
    """spec_kv §17: 11 bytes a token and KV head for 512; here with scales of labels, and what a page holds besides."""
    total, wide, r = 8192, 128, 8
    k, v = torch.randn(2, 1, total, 1, wide).bfloat16()
    labels = LabelCache(torch.arange(r)[None], 4)
    labels.append(k)
    packed = kv_pack(k, v, "kivi-2")
    label_bytes = (labels.nbytes - labels.channels.numel() * 8) / total
    row_bytes = 2 * 128 * packed.format.bits_per_element(wide)[0] / 8
    assert label_bytes == r / 2 + 2
    assert 512 / (label_bytes + row_bytes / 16) > 40


def test_heads_of_different_lengths_and_too_small_budgets_are_refused() -> None:
    q, k, v = made(1, 300)
    labels = LabelCache(channels(4)).append(k)
    kept = torch.stack([torch.arange(200), torch.full((200,), -1).index_fill(0, torch.arange(9), 3)])
    kept[1, :9] = torch.arange(9)
    with pytest.raises(ValueError, match="equally many tokens"):
        double_sparse_decode(q, kv_pack(k, v, "int8").keep(kept[None]), labels, 16)
    with pytest.raises(ValueError, match="n_keep must have room"):
        double_sparse_decode(q, (k, v, None), labels, 5, sink=3, recent=3)
    with pytest.raises(ValueError, match="labels must be of the cache's 300 tokens, got 299"):
        double_sparse_decode(q, (k, v, None), LabelCache(channels(4)).append(k[:, :299]), 16)
    with pytest.raises(TypeError, match=r"labels must be a fastok\.sparse\.LabelCache, got NoneType"):
        double_sparse_decode(q, (k, v, None), None, 16)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"cache must be .* got NoneType"):
        double_sparse_decode(q, None, labels, 16)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"cache must be .* got a tuple of 2"):
        double_sparse_decode(q, (k, v), labels, 16)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="seq_lens must be a tensor"):
        double_sparse_decode(q, (k, v, [300]), labels, 16)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="sink must be an int, got str"):
        double_sparse_decode(q, (k, v, None), labels, 16, sink="1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="recent must be >= 0, got -1"):
        double_sparse_decode(q, (k, v, None), labels, 16, recent=-1)


def test_compiles_without_graph_breaks() -> None:
    q, k, v = made(1, 80)
    labels = LabelCache(channels(4)).append(k)

    def step(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return double_sparse_decode(q, (k, v, None), labels, 16, sink=1)

    for got, wanted in zip(torch.compile(step, fullgraph=True)(q), step(q), strict=True):
        assert_same(got, wanted)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@over_backends("double_sparse_decode", without=("reference", "triton-interpreter", "cuda-on-host"))
def test_one_op_is_its_two_parts(backend: Backend, shared: bool, paged: bool, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            q, k, v = made(2, 96, 2, dtype)
            labels = LabelCache(channels(4), 8).append(k)
            lengths, table = torch.tensor([96, 41]), None
            if paged:
                k, v = (x.reshape(12, 16, G, D) for x in (k, v))
                table = torch.arange(12, dtype=torch.int32).view(2, 6)
            labelled = (labels.data, labels.scale, labels.channels, G, shared, 17, 2, 3)
            tokens, _ = backend.label_tokens(q, *labelled, lengths)
            wanted = *backend.decode(q, k, v, lengths, table, 0.2, 5.0, None, tokens), tokens
            found = backend.double_sparse_decode(q, k, v, lengths, table, 0.2, 5.0, *labelled)
            for got, part in zip(found, wanted, strict=True):
                assert_same(got, part)
    finally:
        torch.set_num_threads(before)


def test_opcheck() -> None:
    for arguments in (one.arguments(torch.float32, 0) for one in examples("small") if one.op == "double_sparse_decode"):
        torch.library.opcheck(torch.ops.fastok.double_sparse_decode.default, arguments)


def test_labels_must_be_of_the_cache() -> None:
    q, k, v = made(1, 80)
    with pytest.raises(ValueError, match="labels must be of the cache's 2 KV heads, got 1"):
        double_sparse_decode(q, (k, v, None), LabelCache(channels(4, 1)).append(k[:, :, :1]), 16)


def test_labels_can_be_begun_inside_a_graph() -> None:
    q, k = torch.randn(1, 1, 4, 8), torch.randn(1, 20, 2, 8)

    def scores(q: Tensor, k: Tensor) -> Tensor:
        labels = LabelCache(torch.tensor([[0, 3], [7, 1]]), 4)
        return label_scores(q, labels.append(k[:, :12]).append(k[:, 12:]))

    assert_same(torch.compile(scores, fullgraph=True)(q, k), scores(q, k))


def test_selection_by_lengths_reads_no_value_on_a_device() -> None:
    """Where it would have to wait for it. Tensors of no values raise when one is read."""
    with FakeTensorMode():
        lengths = torch.zeros(2, dtype=torch.int64, device="cuda")
        index, count = select_tokens(torch.rand(2, 3, 9, device="cuda"), 4, seq_lens=lengths)
    assert index.shape == (2, 3, 4)
    assert count.shape == (2, 3)


def test_labels_hold_no_graph() -> None:
    q, k = torch.randn(1, 1, 4, 8, requires_grad=True), torch.randn(1, 20, 2, 8, requires_grad=True)
    labels = LabelCache(torch.tensor([[0, 3], [7, 1]])).append(k).append(k)
    assert not labels.data.requires_grad
    assert not label_scores(q, labels).requires_grad
