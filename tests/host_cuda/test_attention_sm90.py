"""The Hopper kernels of attention on the host SIMT machine, whose TMA, mbarriers and wgmma test_machine.py tests.

Every test sees to it that these kernels serve: they are the only ones with blocks of more than four warps.
"""

import math

import pytest
import torch

host = pytest.importorskip("host_cuda")
from host_cuda.test_attention_kernels import check_attention, check_scores, inputs, masking, offsets  # noqa: E402

HALVES = (torch.float16, torch.bfloat16)
INF = math.inf
over_halves = pytest.mark.parametrize("dtype", HALVES, ids=str)
over_widths = pytest.mark.parametrize("width", [64, 128])


@pytest.fixture(autouse=True)
def _hopper(monkeypatch):
    """Plays a Hopper, and fails where another kernel served."""
    monkeypatch.setattr(host, "capability", 90)
    call = host.call

    def checked(op, *args, **options):
        call(op, *args, **options)
        assert max(threads for threads, _ in host.native.launches()) >= 384, f"another kernel served {op}"

    monkeypatch.setattr(host, "call", checked)


# ---- forward ---------------------------------------------------------------------------------------------------------


@over_halves
@over_widths
@pytest.mark.parametrize(("s", "t"), [(65, 1), (128, 128), (192, 256), (200, 129), (129, 700)])
def test_full(dtype, width, s, t):
    """Tails of rows and of keys, one tile, whole tiles, more tiles than there are stages."""
    check_attention(*inputs(dtype, s, t, width=width), *masking(width, right=-1))


@over_widths
@pytest.mark.parametrize(("s", "t"), [(200, 200), (130, 333), (333, 130), (500, 40)])
def test_causal(width, s, t):
    """Aligned to the bottom right: the first rows see nothing where there are more queries than keys."""
    check_attention(*inputs(torch.float16, s, t, width=width), *masking(width))


@over_widths
@pytest.mark.parametrize(("left", "right"), [(0, 0), (70, -1), (-1, 200), (130, 9), (1000, 1000)])
def test_windows(width, left, right):
    check_attention(*inputs(torch.bfloat16, 260, 300, width=width), *masking(width, left=left, right=right))


@pytest.mark.parametrize(
    ("width", "v_width"), [(40, 40), (64, 48), (56, 64), (104, 104), (128, 112), (112, 8), (8, 128)]
)
def test_rows_padded_by_the_copy(width, v_width):
    check_attention(*inputs(torch.float16, 70, 140, width=width, v_width=v_width), *masking(width))


@over_widths
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_heads_share_keys(width, groups):
    check_attention(*inputs(torch.float16, 66, 150, heads=6, groups=groups, width=width, batch=(2,)), *masking(width))


@over_widths
@pytest.mark.parametrize("per_head", [False, True])
def test_bias(width, per_head):
    bias = torch.randn(2, 4, 300) if per_head else torch.randn(2, 300)
    bias[..., ::3] = -INF
    bias[1] = -INF
    check_attention(
        *inputs(torch.bfloat16, 140, 300, heads=4, groups=2, width=width, batch=(2,)),
        *masking(width, key_bias=bias, left=190),
    )


def test_strided_and_broadcast_views():
    """Hugging Face's heads-first layout, one projection for q, k and v, and keys that all heads or samples share."""
    q = torch.randn(2, 3, 70, 64).half().transpose(1, 2)
    qkv = torch.randn(2, 70, 3, 3, 64).half()
    check_attention(q, qkv[:, :, 1], qkv[:, :, 2], *masking(64))
    one = torch.randn(1, 70, 1, 64).half()
    check_attention(q, one.expand(2, 70, 3, 64), qkv[:, :, 2], *masking(64))
    check_attention(q, qkv[:, :, 1], one.expand(2, 70, 3, 64), *masking(64))


@over_halves
@over_widths
def test_packed(dtype, width):
    cu_q, cu_k = offsets(70, 0, 130, 1, 33), offsets(9, 12, 300, 0, 33)
    q, k, v = inputs(dtype, 240, 360, width=width, batch=())  # tokens behind the last sequence
    mask = masking(width, cu_q=cu_q, cu_k=cu_k, key_bias=torch.randn(360))
    check_attention(q, k, v, *mask)
    check_attention(q, k, v, *masking(width, cu_q=cu_q, cu_k=cu_k, right=-1, max_q=130, max_k=300))


@over_widths
def test_packed_neighbours_do_not_leak(width):
    """What the copies bring along of the next sequence may be anything."""
    q, k, v = inputs(torch.float16, 140, 280, width=width, batch=())
    cu_q, cu_k = offsets(70, 70), offsets(150, 130)
    mask = masking(width, cu_q=cu_q, cu_k=cu_k, right=-1)
    out, lse = check_attention(q, k, v, *mask)
    for tensor in (k, v):
        tensor[150:] = math.nan
        tensor[160:] = INF
    q[70:] = math.nan
    spoilt, spoilt_lse = host.attention(q, k, v, *mask)
    assert torch.equal(spoilt[:70], out[:70])
    assert torch.equal(spoilt_lse[:, :70], lse[:, :70])


@over_widths
def test_batch_invariance(width):
    q, k, v = inputs(torch.bfloat16, 150, 260, heads=4, groups=2, width=width, batch=(3,))
    out, lse = check_attention(q, k, v, *masking(width))
    alone, alone_lse = host.attention(q[1:2], k[1:2], v[1:2], *masking(width))
    assert torch.equal(alone, out[1:2])
    assert torch.equal(alone_lse, lse[1:2])
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    cu_q, cu_k = offsets(150, 150, 150), offsets(260, 260, 260)
    packed, packed_lse = host.attention(*flat, *masking(width, cu_q=cu_q, cu_k=cu_k))
    assert torch.equal(packed.unflatten(0, (3, 150)), out)
    assert torch.equal(packed_lse.unflatten(1, (3, 150)).transpose(0, 1), lse)


@over_widths
@pytest.mark.parametrize("magnitude", [200.0, 1e-6])
def test_extreme_logits(width, magnitude):
    q, k, v = inputs(torch.float16, 70, 140, width=width)
    scale = magnitude * width**-0.5
    check_attention(q / 8, k / 8, v, 64 * scale / 16, *masking(width)[1:])


@over_widths
def test_schedule_changes_no_result(width, monkeypatch):
    q, k, v = inputs(torch.bfloat16, 200, 400, heads=2, width=width)
    found = []
    for seed in (0, 1000, 2000):
        monkeypatch.setattr(host, "seed", seed)
        out, lse = host.attention(q, k, v, *masking(width))
        found.append((out, lse, check_scores(q, k, masking(width), lse, group=2)))
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, found[0], strict=True))


# ---- column sums -----------------------------------------------------------------------------------------------------


def finished(q, k, v, mask):
    return host.attention(q, k, v, *mask)[1]


@over_halves
@over_widths
@pytest.mark.parametrize(("s", "t"), [(65, 1), (128, 128), (129, 200), (300, 150), (900, 70)])
def test_sums(dtype, width, s, t):
    """From one tile of rows to more than there are stages."""
    q, k, v = inputs(dtype, s, t, width=width)
    mask = masking(width, right=-1)
    sums = check_scores(q, k, mask, finished(q, k, v, mask), group=2)
    torch.testing.assert_close(sums.sum(-1), torch.full_like(sums[..., 0], 2.0 * s))


@over_widths
@pytest.mark.parametrize(("left", "right"), [(-1, 0), (0, 0), (70, -1), (-1, 200), (130, 9)])
def test_sums_of_windows(width, left, right):
    q, k, v = inputs(torch.bfloat16, 260, 300, width=width)
    mask = masking(width, left=left, right=right)
    check_scores(q, k, mask, finished(q, k, v, mask))


@over_widths
@pytest.mark.parametrize("group", [1, 2, 6])
def test_sums_of_heads_bias_and_weights(width, group):
    bias = torch.randn(2, 6, 150)
    bias[..., ::3] = -INF
    q, k, v = inputs(torch.float16, 140, 150, heads=6, groups=2, width=width, batch=(2,))
    mask = masking(width, key_bias=bias)
    check_scores(q, k, mask, finished(q, k, v, mask), weight=torch.rand(2, 2, 150), group=group)


@pytest.mark.parametrize(("begin", "end"), [(0, 70), (33, 200), (130, 300)])
def test_sums_of_some_rows(begin, end):
    q, k, v = inputs(torch.float16, 300, 200)
    check_scores(q, k, masking(64), finished(q, k, v, masking(64)), begin=begin, end=end)
    check_scores(q, k, masking(64), None, begin=begin, end=end)  # the log-sum-exp is then by selected row


def test_sums_in_parts():
    q, k, v = inputs(torch.float16, 1100, 30, heads=1)
    mask = masking(64, left=400, right=-1)
    check_scores(q, k, mask, finished(q, k, v, mask))


def test_rows_that_see_nothing_do_not_count():
    q, k, v = inputs(torch.float16, 200, 90)
    bias = torch.full((1, 90), -INF)
    mask = masking(64, key_bias=bias)
    assert (check_scores(q, k, mask, finished(q, k, v, mask)) == 0).all()


@pytest.mark.parametrize("rows", [(0, 2**31 - 1), (-70, 2**31 - 1), (1, -1)])
def test_sums_of_packed_sequences(rows):
    mask = masking(64, cu_q=offsets(90, 0, 1, 140), cu_k=offsets(130, 20, 0, 260))
    q, k, v = inputs(torch.float16, 235, 415, batch=())
    lse = finished(q, k, v, mask)
    sums = check_scores(q, k, mask, lse, begin=rows[0], end=rows[1], group=2)
    q[90:], k[150:], lse[:, 90:] = math.nan, INF, math.nan
    spoilt = host.attention_scores(q, k, lse, None, *mask, None, *rows, 0, 415, False, "sum", 2, False, False)
    assert torch.equal(spoilt[..., :150], sums[..., :150])
