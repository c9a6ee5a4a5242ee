"""k_center by clusters on the host SIMT machine, with tokens in shared memory and without; the planner.

tests/test_k_center.py compares clusters with the other plans on all its inputs, whose tokens fit in shared memory.
"""

import math

import pytest
import torch
from fastok.reference import k_center_picks
from fastok.testing import assert_same
from fastok.testing.examples.registry import odd_view, signs

host = pytest.importorskip("host_cuda")

MOST = 227 << 10


def plan(n, width, k=10, *, batch=1, cosine=True, max_sum=False, isolated=False, arch=90, most=MOST):
    return host.native.plan_k_center(batch, n, width, k, cosine, max_sum, isolated, arch, most)


def check(x, k, metric="cosine", objective="max_min", start="first", mask=None, *, most=MOST, blocks=8):
    """The picks of the specification, by clusters of so many blocks."""
    first = torch.full((x.shape[0],), x.shape[1] - 1) if start == "given" else None
    arguments = (x, k, metric, objective, start, first, mask, 0)
    with host.playing(90, most):
        got = host.k_center(*arguments)
    assert [cluster for _, cluster in host.native.launches()][-1] == blocks
    for ours, spec in zip(got, k_center_picks(*arguments), strict=True):
        assert_same(ours, spec)


def awkward(batch, n, width, dtype):
    """Tokens with ties, some of them not finite, and a mask."""
    x = signs(batch, n, width) * torch.randint(1, 3, (batch, n, 1))
    x[:, ::13] = math.nan
    x[0, n // 2, width // 2] = math.inf
    return x.to(dtype), torch.rand(batch, n) < 0.9


# What a device grants a block, how many of its 75 tokens of 12 channels are then kept, and whether their state is. Sums
# take 1 KiB more.
FITS = {"all": (MOST, 75, True), "some": (7000, 64, True), "none": (4000, 0, True), "not even state": (3000, 0, False)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("objective", ["max_min", "max_sum"])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_wherever_tokens_are_kept(metric, objective, dtype):
    """Blocks whose warps take four tokens at once, then one."""
    for i, (name, (most, resident, shared_state)) in enumerate(FITS.items()):
        most = most + 1024 if objective == "max_sum" and most < MOST else most
        planned = plan(600, 12, cosine=metric == "cosine", max_sum=objective == "max_sum", most=most)
        assert (planned["share"], planned["resident"], planned["shared_state"]) == (75, resident, shared_state), name
        x, mask = awkward(1, 600, 12, dtype)
        host.seed = i
        check(x, 4, metric, objective, ("norm", "first", "given", "norm")[i], mask if i % 2 else None, most=most)


@pytest.mark.parametrize("most", [MOST, 2600])
def test_rows_that_cannot_be_read_by_fours(most):
    assert plan(70, 36, most=most)["resident"] == (9 if most == MOST else 0)
    for dtype in (torch.float32, torch.bfloat16):
        for x in (odd_view(torch.randn(2, 70, 36).to(dtype)), torch.randn(2, 70, 33).to(dtype)):
            check(x, 6, most=most)
            check(x, 6, "euclidean", "max_sum", "norm", most=most)


@pytest.mark.parametrize(("n", "blocks"), [(1, 1), (2, 1), (16, 1), (17, 2), (33, 4), (65, 8)])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_every_size_of_cluster(metric, n, blocks):
    x, mask = awkward(2, n, 9, torch.float32)
    for k in {1, min(n, 7), n if n < 20 else 9}:
        check(x, k, metric, "max_min", "first", blocks=blocks)
        check(x, k, metric, "max_sum", "given", mask, blocks=blocks)


@pytest.mark.parametrize("objective", ["max_min", "max_sum"])
def test_isolated_start(objective):
    """Few picks are not worth all distances of the cosine, but the start is; the other distance has no such plan."""
    x, mask = awkward(2, 90, 16, torch.float16)
    check(x, 7, "cosine", objective, "isolated", mask)
    check(x, 9, "euclidean", objective, "isolated", mask)


def test_more_picks_than_tokens():
    """Then those that are not finite, then none."""
    x, mask = awkward(3, 30, 6, torch.float32)
    mask[1] = torch.arange(30).remainder(13) == 0
    mask[2] = torch.arange(30) == 17
    check(x, 30, "cosine", "max_min", "norm", mask, blocks=2)
    check(torch.full((1, 20, 3), math.nan), 20, "euclidean", "max_sum", "first", blocks=2)


def test_no_channels():
    check(torch.zeros(2, 70, 0), 5)


def test_schedules_change_nothing():
    x, mask = awkward(2, 100, 12, torch.bfloat16)
    for host.seed in range(0, 1000, 100):
        check(x, 5, "cosine", "max_sum" if host.seed % 200 else "max_min", "norm", mask)


# ---- the planner -----------------------------------------------------------------------------------------------------


def test_who_picks():
    """Clusters from sm_90 on, but where all distances are needed anyway."""
    assert not plan(576, 1024, 58)["gram"]
    assert plan(576, 1024, 58)["blocks"] == 8
    assert plan(576, 1024, 58, isolated=True)["gram"]
    assert plan(576, 1024, 58, isolated=True)["blocks"] == 0
    assert not plan(576, 1024, 58, isolated=True, cosine=False)["gram"]
    assert not plan(576, 1024, 7, isolated=True)["gram"]
    assert not plan(8193, 1024, 58, isolated=True)["gram"]
    assert not plan(8192, 1024, 58, isolated=True, batch=3)["gram"]
    assert plan(576, 1024, 58, arch=100)["blocks"] == 8
    for arch in (80, 86, 89):
        assert plan(576, 1024, 58, arch=arch)["gram"]
        assert not plan(9000, 1024, 58, arch=arch)["gram"]
        assert plan(9000, 1024, 58, arch=arch)["blocks"] == 0


def test_what_blocks_keep():
    # An image: three quarters of it. In fewer channels all.
    assert plan(576, 1024, 58) | {"bytes": 0} == {
        "gram": False, "blocks": 8, "warps": 16, "share": 72, "resident": 48, "shared_state": True, "bytes": 0,
    }  # fmt: skip
    assert plan(576, 512, 58)["resident"] == 72
    # A video: nothing but what is known of the tokens, and some of these.
    video = plan(65536, 1152, 4096)
    assert (video["share"], video["shared_state"], video["resident"]) == (8192, True, 16)
    assert plan(1 << 20, 1152, 4096)["shared_state"] is False
    # Where blocks are granted less, and where not even the pick fits.
    assert plan(576, 1024, 58, most=99 << 10)["resident"] == 16
    assert plan(576, 57000, 58)["blocks"] == 8
    assert plan(576, 60000, 58)["blocks"] == 0


def test_plans_fit():
    for n in (1, 15, 16, 17, 100, 576, 2880, 5000, 65536, 1 << 20, (1 << 30) - 1):
        for width in (0, 1, 33, 1024, 4096, 50000, 1 << 20):
            for most in (3000, 48 << 10, 99 << 10, MOST):
                for max_sum in (False, True):
                    p = plan(n, width, cosine=False, max_sum=max_sum, most=most)
                    if p["blocks"] == 0:
                        assert 4 * width + 4 * 2 * 128 * 3 + 500 > most
                        continue
                    assert p["bytes"] <= most
                    assert p["blocks"] in (1, 2, 4, 8)
                    assert (p["blocks"] - 1) * p["share"] < n <= p["blocks"] * p["share"]
                    assert 1 <= p["warps"] <= min(16, p["share"])
                    assert p["resident"] == p["share"] or p["resident"] % p["warps"] == 0
                    assert 0 <= p["resident"] <= p["share"]
