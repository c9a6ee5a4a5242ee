"""The attention kernels on the host SIMT machine where plans differ: every instance, split keys, pieces of columns.

What attention means is tested in tests/test_attention*.py, which this machine serves as a backend.
"""

import itertools

import pytest
import torch

host = pytest.importorskip("host_cuda")
reference = pytest.importorskip("fastok.reference.attention")

HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALVES)
END = 2**31 - 1
# One rounding of the powers and one of the result to the dtype, on values of about 1; fp32 by its sums.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def inputs(dtype, s, t, heads=2, groups=1, width=64, v_width=None, batch=(1,)):
    q = torch.randn(*batch, s, heads, width).to(dtype)
    k, v = (torch.randn(*batch, t, groups, w).to(dtype) for w in (width, v_width or width))
    return q, k, v


def masking(width, left=-1, right=0, softcap=0.0, key_bias=None, cu_q=None, cu_k=None, max_q=-1, max_k=-1):
    return width**-0.5, left, right, softcap, key_bias, cu_q, cu_k, max_q, max_k


def check_attention(q, k, v, *mask):
    out, lse = host.attention(q, k, v, *mask)
    wanted, wanted_lse = reference.attention(q.double(), k.double(), v.double(), *mask)
    torch.testing.assert_close(out.double(), wanted, rtol=TOLERANCE[q.dtype], atol=TOLERANCE[q.dtype])
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-6, atol=3e-6)
    return out, lse


def check_scores(
    q, k, mask, lse=None, weight=None, rows=None, begin=0, end=None, reduce="sum", group=1, head_max=False
):
    arguments = (
        *mask,
        rows,
        begin,
        q.shape[-3] if end is None else end,
        0,
        k.shape[-3],
        False,
        reduce,
        group,
        head_max,
    )
    ours = host.attention_scores(q, k, lse, weight, *arguments, False)
    wanted = reference.attention_scores(q.double(), k.double(), lse, weight, *arguments, False)
    torch.testing.assert_close(ours.double(), wanted, rtol=2e-6, atol=1e-6)
    return ours


def offsets(*lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


# ---- forward ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("s", [20, 70])
@pytest.mark.parametrize("width", [8, 32, 40, 64, 96, 128, 192, 256])
def test_every_instance(dtype, s, width):
    check_attention(*inputs(dtype, s, 90, width=width), *masking(width))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "v_width"), [(256, 8), (8, 256), (64, 104)])
def test_values_of_another_width(dtype, width, v_width):
    check_attention(*inputs(dtype, 18, 70, width=width, v_width=v_width), *masking(width))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [512, 513, 1100])
def test_split_keys_and_packed_heads(dtype, t):
    """A few queries: query heads share a block, and the keys are split beyond 512."""
    q, k, v = inputs(dtype, 5, t, heads=6, groups=2, width=32, batch=(2,))
    mask = masking(32, left=700)
    out, lse = check_attention(q, k, v, *mask)
    alone = host.attention(q[1:], k[1:], v[1:], *mask)
    assert torch.equal(out[1:], alone[0])
    assert torch.equal(lse[1:], alone[1])


def test_split_that_sees_nothing():
    bias = torch.zeros(1, 800)
    bias[:, :300] = -float("inf")
    check_attention(*inputs(torch.float16, 3, 800), *masking(64, key_bias=bias))
    check_attention(*inputs(torch.float16, 3, 800), *masking(64, key_bias=torch.full_like(bias, -float("inf"))))


@pytest.mark.parametrize("hint", [-1, 9])
def test_split_keys_of_packed_sequences(hint):
    cu_q, cu_k = offsets(9, 0, 1, 4), offsets(530, 20, 0, 300)
    q, k, v = inputs(torch.float16, 16, 860, batch=())
    check_attention(q, k, v, *masking(64, cu_q=cu_q, cu_k=cu_k, max_q=hint, max_k=hint))


def test_schedule_changes_no_result():
    q, k, v = inputs(torch.bfloat16, 130, 140, heads=4, groups=2)
    found = []
    for host.seed in (0, 1000, 2000):
        out, lse = host.attention(q, k, v, *masking(64))
        found.append((out, lse, check_scores(q, k, masking(64), lse, group=4)))
    for again, first in itertools.product(found[1:], found[:1]):
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


# ---- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 128, 136, 256])
@pytest.mark.parametrize("rows", [3, 70])
def test_every_score_instance(dtype, width, rows):
    q, k, v = inputs(dtype, 75, 150, heads=4, groups=2, width=width)
    lse = host.attention(q, k, v, *masking(width))[1]
    check_scores(q, k, masking(width), lse, begin=75 - rows, group=4)


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("head_max", [False, True])
@pytest.mark.parametrize("reduce", ["sum", "max", "none"])
def test_heads_then_rows(group, head_max, reduce):
    """Where heads and rows are reduced alike, blocks share them; else one block goes row by row."""
    q, k, _ = inputs(torch.float16, 40, 70, heads=4, groups=2)
    weight = torch.rand(1, 2, 70)
    check_scores(q, k, masking(64), None, weight, begin=3, end=37, reduce=reduce, group=group, head_max=head_max)


@pytest.mark.parametrize("reduce", ["sum", "max"])
def test_parts_of_the_rows(reduce):
    q, k, _ = inputs(torch.float16, 1100, 30, heads=1, width=16)
    check_scores(q, k, masking(16, left=400, right=-1), reduce=reduce)


def test_listed_rows_of_split_keys():
    q, k, _ = inputs(torch.bfloat16, 50, 600, heads=4, groups=2, batch=(2,))
    check_scores(q, k, masking(64), rows=torch.tensor([49, 0, 7, 7, 31]), group=2)


@pytest.mark.parametrize("rows", [(0, END), (-2, END), (1, -1)])
def test_scores_of_packed_sequences(rows):
    mask = masking(64, cu_q=offsets(9, 0, 1, 40), cu_k=offsets(130, 20, 0, 60))
    q, k, _ = inputs(torch.float16, 55, 215, batch=())
    check_scores(q, k, mask, begin=rows[0], end=rows[1], group=2)
