"""attention and merge_states on every backend: against the specification in fp64, which is held against dense code."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import fastok
import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    DTYPES,
    MASKS,
    SLOW,
    Case,
    dense_attention,
    flat,
    in_fp64,
    over_masks,
    packed,
    sized,
    some_masks,
    through,
)
from attention_cases import one_thread as one_thread
from fastok.testing import Backend, assert_accurate, assert_same, over_backends
from fastok.testing.examples import verify
from fastok.testing.examples.attention import cu, odd_heads
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

over_attention = over_backends("attention", without=("reference",))
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def attend(case: Case) -> tuple[Tensor, Tensor]:
    return fastok.attention(*case.qkv, **case.mask)


# ---- what attention is -----------------------------------------------------------------------------------------------


@over_masks
def test_specification_is_the_dense_formula(mask: str) -> None:
    case = MASKS[mask]()
    with in_fp64():
        torch.testing.assert_close(attend(case), dense_attention(case))


@over_dtypes
@over_masks
@over_attention
def test_masks(backend: Backend, mask: str, dtype: torch.dtype) -> None:
    some_masks(backend, mask)
    with through(backend):
        out, lse = attend(MASKS[mask]().to(dtype))
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    hidden = lse.transpose(-1, -2) == -math.inf
    assert (out[hidden] == 0).all()
    assert torch.isfinite(out).all()


@over_dtypes
@pytest.mark.parametrize(
    ("s", "t", "heads", "groups", "width", "causal"),
    [(197, 197, 6, 6, 64, False), (130, 300, 8, 2, 128, True)],
)
@over_backends("attention", without=("reference", *SLOW))
def test_errs_no_more_than_torch(
    backend: Backend, s: int, t: int, heads: int, groups: int, width: int, causal: bool, dtype: torch.dtype
) -> None:
    case = sized(2, s, t, heads, groups, width, causal=causal).to(dtype)
    out, _ = backend_attention(backend, case)
    truth, _ = dense_attention(case)
    seen = torch.ones(s, t, dtype=torch.bool).tril(t - s) if causal else None
    q, k, v = (x.transpose(1, 2) for x in case.qkv)
    peer = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=heads != groups)
    assert_accurate(out, truth, peer.transpose(1, 2))


# On the CPU up to 4 rows read their keys in place, 512 at a time, and up to 16 rows pack them, 2048 at a time.
FEW: dict[str, Callable[[], Case]] = {
    "decoding": lambda: sized(2, 1, 1030, heads=8, groups=2, width=128),
    "a-row-that-sees-nothing": lambda: sized(1, 3, 2, width=16, causal=True),
    "causal-wide-group": lambda: sized(1, 4, 545, heads=21, groups=1, width=40, v_width=24, causal=True),
    "window": lambda: sized(1, 3, 1100, width=64, window=(530, 0)),
    "bias-hides-a-part": lambda: sized(2, 2, 1060, softcap=3.0, key_bias=first_hidden(2, 4, 1060)),
    "packed": lambda: packed((1, 0, 4, 20, 2, 7), (600, 5, 33, 40, 0, 2100), behind=1, causal=True),
    "split": lambda: sized(1, 16, 2070, heads=2, groups=1, width=32, causal=True),
}


def first_hidden(*shape: int) -> Tensor:
    """A bias that hides the first 600 keys."""
    bias = torch.randn(shape)
    bias[..., :600] = -math.inf
    return bias


@over_dtypes
@pytest.mark.parametrize("few", FEW)
@over_backends("attention", without=("reference", *SLOW))
def test_few_rows(backend: Backend, few: str, dtype: torch.dtype) -> None:
    with through(backend):
        out, _ = attend(FEW[few]().to(dtype))
    assert torch.isfinite(out).all()


def backend_attention(backend: Backend, case: Case) -> tuple[Tensor, Tensor]:
    """The public function on ``backend``, its results unchecked."""
    with through(backend, check=False):
        return attend(case)


@given(
    batch=st.integers(0, 3), s=st.integers(0, 40), t=st.integers(0, 70), groups=st.integers(1, 3),
    ratio=st.integers(1, 4), width=st.integers(1, 32), v_width=st.integers(0, 32), left=st.integers(-1, 50),
    right=st.integers(-1, 50), biased=st.sampled_from([None, "sample", "head"]), softcap=st.sampled_from([None, 2.0]),
    seed=st.integers(0, 1000), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
@over_backends("attention", without=("reference", "cuda", *SLOW))
def test_any_shape(
    backend: Backend, batch, s, t, groups, ratio, width, v_width, left, right, biased, softcap, seed, dtype
) -> None:
    torch.manual_seed(seed)
    heads = groups * ratio
    case = sized(batch, s, t, heads, groups, 8 * width, 8 * v_width, window=(left, right), softcap=softcap)
    if biased:
        bias = torch.randn((batch, t) if biased == "sample" else (batch, heads, t))
        case.mask["key_bias"] = torch.where(torch.rand(bias.shape) < 0.4, -math.inf, bias)
    with through(backend):
        attend(case.to(dtype))


@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=6),
    behind=st.integers(0, 3), causal=st.booleans(), seed=st.integers(0, 1000), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
@over_backends("attention", without=("reference", "cuda", *SLOW))
def test_any_packing(backend: Backend, lengths, behind, causal, seed, dtype) -> None:
    torch.manual_seed(seed)
    lengths_q, lengths_k = zip(*lengths, strict=True)
    case = packed(lengths_q, lengths_k, behind, causal=causal).to(dtype)
    with through(backend):
        attend(case)


@pytest.mark.parametrize("width", range(8, 257, 8))
@over_backends("attention", without=("reference", "cuda", *SLOW))
def test_every_head_dim(backend: Backend, width: int) -> None:
    for dtype in DTYPES:
        with through(backend):
            attend(sized(1, 5, 21, 2, 1, width, 264 - width, causal=True).to(dtype))


@over_attention
def test_uniform_attention_averages_the_values(backend: Backend) -> None:
    case = sized(causal=True)
    case.q.zero_()
    case.v.copy_(torch.randint(-8, 9, case.v.shape))
    out, lse = backend_attention(backend, case)
    for i in range(17):
        seen = i + 29 - 17 + 1
        wanted = case.v[:, :seen].double().mean(1).repeat_interleave(2, 1)
        torch.testing.assert_close(out[:, i].double(), wanted, atol=8 * torch.finfo().eps, rtol=0)
        torch.testing.assert_close(lse[:, :, i], torch.full((2, 4), math.log(seen)))


# ---- packed sequences, batches, repeats ------------------------------------------------------------------------------


@over_dtypes
@pytest.mark.parametrize("mask", [name for name in MASKS if name.startswith("packed")])
@over_attention
def test_packed_equals_each_sequence(backend: Backend, mask: str, dtype: torch.dtype) -> None:
    some_masks(backend, mask)
    case = MASKS[mask]().to(dtype)
    out, lse = backend_attention(backend, case)
    options = {name: case.mask[name] for name in case.mask if name in ("causal", "window", "softcap")}
    bias = case.mask.get("key_bias")
    starts_q, starts_k = case.mask["cu_seqlens_q"].tolist(), case.mask["cu_seqlens_k"].tolist()
    for i in range(len(starts_q) - 1):
        of_q, of_k = slice(*starts_q[i : i + 2]), slice(*starts_k[i : i + 2])
        if bias is not None:
            options["key_bias"] = bias[None, ..., of_k]
        alone = Case(case.q[None, of_q], case.k[None, of_k], case.v[None, of_k], options)
        verify("attention", flat(fastok.attention, *alone.qkv, **options), (out[None, of_q], lse[None, :, of_q]))
    behind = slice(starts_q[-1], None)
    assert (out[behind] == 0).all()
    assert (lse[:, behind] == -math.inf).all()


@over_attention
def test_nothing_leaks_between_packed_sequences(backend: Backend) -> None:
    case = packed((5, 20, 7), (9, 12, 7), behind=3, causal=True)
    clean, clean_lse = backend_attention(backend, case)
    for x in (case.q, case.k):
        x[9:12] = math.nan  # within the second sequence of both
        x[-3:] = math.nan  # behind the last
    out, lse = backend_attention(backend, case)
    others = [*range(5), *range(25, 32)]
    assert_same(out[others], clean[others])
    assert_same(lse[:, others], clean_lse[:, others])


@pytest.mark.parametrize("mask", ["none", "causal-S>T", "bias-heads", "several-tiles", "one-row", "decoding", "split"])
@over_backends("attention", without=("reference", "triton-interpreter"))
def test_batch_invariant_and_repeatable(backend: Backend, mask: str) -> None:
    some_masks(backend, mask)
    for dtype in (torch.float32, torch.bfloat16):
        case = (MASKS | FEW)[mask]().to(dtype)
        bias = case.mask.get("key_bias")
        repeat = {**case.mask, "key_bias": None if bias is None else bias.repeat(3, *([1] * (bias.dim() - 1)))}
        bigger = Case(*(x.repeat(3, 1, 1, 1) for x in case.qkv), repeat)
        first, many = backend_attention(backend, case), backend_attention(backend, bigger)
        for part, again, copies in zip(first, backend_attention(backend, case), many, strict=True):
            assert_same(again, part)
            assert_same(copies, part.repeat(3, *([1] * (part.dim() - 1))))


def test_thread_count_does_not_change_results() -> None:
    cases = [make().to(dtype) for make in (MASKS | FEW).values() for dtype in (torch.float32, torch.bfloat16)]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)  # and afterwards what it was: one_thread
        results.append([part for case in cases for part in attend(case)])
    for other in results[1:]:
        for part, wanted in zip(other, results[0], strict=True):
            assert_same(part, wanted)


# ---- hard numbers ----------------------------------------------------------------------------------------------------

LARGEST = {torch.float32: 1e37, torch.float16: 3e4, torch.bfloat16: 1e37}
SUBNORMAL = {torch.float32: 1e-41, torch.float16: 1e-7, torch.bfloat16: 1e-40}


@over_dtypes
@over_attention
def test_logits_of_plus_and_minus_200(backend: Backend, dtype: torch.dtype) -> None:
    case = sized(width=64, scale=1.0)
    case.q.sign_()
    case.k.copy_(case.q[:, :1, :1] * torch.linspace(-200 / 64, 200 / 64, 29)[None, :, None, None])
    with through(backend):
        attend(case.to(dtype))


@pytest.mark.parametrize("late", [-30.0, 3.0, 30.0, 150.0])
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window": (300, 0)}], ids=["all", "causal", "window"])
@over_backends("attention", without=("reference", *SLOW))
def test_peaks_among_the_last_keys(backend: Backend, mask: dict[str, Any], late: float) -> None:
    """Far more keys than are worked on at a time, whose logits step up or down where half of them have been seen."""
    case = sized(s=70, t=1000, scale=1.0, **mask)
    case.q[..., 0] = 1.0
    case.k[:, :500, :, 0] = 0.0
    case.k[:, 500:, :, 0] = late
    with through(backend):
        attend(case.to(torch.bfloat16))


@over_dtypes
@over_attention
def test_huge_and_subnormal_inputs(backend: Backend, dtype: torch.dtype) -> None:
    huge, subnormal, shift = LARGEST[dtype], SUBNORMAL[dtype], 2.0 ** (8 if dtype == torch.float16 else 100)
    case = sized(causal=True)
    q, k, v = case.qkv
    for inputs in (
        (q, k, v.clamp(-2, 2) * huge / 2),
        (q, k, v * subnormal),
        (q * subnormal, k, v),
        (q, k * subnormal, v * huge / 8),
        (q * shift, k / shift, v),  # logits of ordinary size; tile instructions may flush subnormal keys, so none
    ):
        with through(backend):
            attend(Case(*inputs, case.mask).to(dtype))


@over_dtypes
@over_attention
def test_nan_stays_in_its_row(backend: Backend, dtype: torch.dtype) -> None:
    case = sized(s=40, t=50, width=64, causal=True).to(dtype)
    out, lse = backend_attention(backend, case)
    case.q[0, 7, 1] = math.nan
    got, got_lse = backend_attention(backend, case)
    assert got[0, 7, 1].isnan().all()
    assert got_lse[0, 1, 7].isnan()
    got[0, 7, 1], got_lse[0, 1, 7] = out[0, 7, 1], lse[0, 1, 7]
    assert_same(got, out)
    assert_same(got_lse, lse)


@over_attention
def test_nan_key_reaches_only_the_rows_that_see_it(backend: Backend) -> None:
    case = sized(s=50, t=50, width=64, causal=True)
    out, lse = backend_attention(backend, case)
    case.k[1, 30, 0] = math.nan  # of query heads 0 and 1
    got, got_lse = backend_attention(backend, case)
    assert got[1, 30:, :2].isnan().all()
    assert got_lse[1, :2, 30:].isnan().all()
    got[1, 30:, :2], got_lse[1, :2, 30:] = out[1, 30:, :2], lse[1, :2, 30:]
    assert_same(got, out)
    assert_same(got_lse, lse)


# ---- layouts ---------------------------------------------------------------------------------------------------------


@over_dtypes
@over_attention
def test_views(backend: Backend, dtype: torch.dtype) -> None:
    case = sized(s=19, t=35, heads=6, groups=2, width=40, causal=True).to(dtype)
    wanted = backend_attention(backend, case)
    for name, (q, k, v) in {
        "Hugging Face": [x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.qkv],
        "odd": [odd_heads(x) for x in case.qkv],
        "fused": [torch.cat([case.q, case.q], -1)[..., 40:], *torch.cat([case.k, case.v], -1).split(40, -1)],
        "batch last": [x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3) for x in case.qkv],
    }.items():
        for part, expected in zip(backend_attention(backend, Case(q, k, v, case.mask)), wanted, strict=True):
            assert_same(part, expected, name)


@over_attention
def test_expanded_heads_and_batch(backend: Backend) -> None:
    case = sized(groups=2, causal=True)
    wanted = backend_attention(backend, case)
    k, v = (x[:, :, :, None].expand(2, 29, 2, 2, 32).reshape(2, 29, 4, 32) for x in (case.k, case.v))
    for part, expected in zip(backend_attention(backend, Case(case.q, k, v, case.mask)), wanted, strict=True):
        assert_same(part, expected)
    one = Case(case.q, *(x[:1, :, :1].expand(2, -1, 4, -1) for x in (case.k, case.v)), case.mask)
    copied = Case(case.q, one.k.contiguous(), one.v.contiguous(), case.mask)
    for part, expected in zip(backend_attention(backend, one), backend_attention(backend, copied), strict=True):
        assert_same(part, expected)


@over_attention
def test_inputs_are_left_as_they_are(backend: Backend) -> None:
    case = MASKS["packed-bias"]()
    before = [x.clone() for x in (*case.qkv, case.mask["key_bias"], case.mask["cu_seqlens_q"])]
    backend_attention(backend, case)
    for x, copy in zip((*case.qkv, case.mask["key_bias"], case.mask["cu_seqlens_q"]), before, strict=True):
        assert_same(x, copy)


# ---- merge_states ----------------------------------------------------------------------------------------------------


def split(case: Case, ranges: list[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
    """Attention over each range of keys."""
    return [fastok.attention(case.q, case.k[:, a:b], case.v[:, a:b]) for a, b in ranges]


@given(cuts=st.lists(st.integers(0, 29), max_size=4), seed=st.integers(0, 100), dtype=st.sampled_from(DTYPES))
def test_any_split_of_the_keys_merges_to_the_whole(cuts, seed, dtype) -> None:
    torch.manual_seed(seed)
    case = sized().to(dtype)
    borders = [0, *sorted(cuts), 29]
    partial = split(case, list(pairwise(borders)))  # some are empty
    whole, whole_lse = attend(case)
    out, lse = partial[0]
    for other in partial[1:]:
        out, lse = fastok.merge_states(out, lse, *other)
    truth, truth_lse = dense_attention(case)
    # Each merge rounds the result, and its parts, to the dtype once more.
    merges = len(partial) - 1
    step = torch.finfo(dtype).eps * case.v.abs().max().double() * merges
    assert_accurate(out, truth, whole, floor=step)
    lse_step = torch.finfo().eps * truth_lse.abs().max().clamp(min=1) * merges
    assert_accurate(lse, truth_lse, whole_lse, floor=lse_step)


@over_dtypes
def test_merging_with_nothing_changes_nothing(dtype: torch.dtype) -> None:
    out, lse = attend(sized().to(dtype))
    garbage, nothing = torch.full_like(out, math.nan), torch.full_like(lse, -math.inf)
    for merged in (fastok.merge_states(out, lse, garbage, nothing), fastok.merge_states(garbage, nothing, out, lse)):
        assert_same(merged[0], out)
        assert_same(merged[1], lse)
    out, lse = fastok.merge_states(garbage, nothing, garbage, nothing)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("s", [5, 12, 37])
def test_merging_does_not_depend_on_the_batch(s: int) -> None:
    """Nor on the place in a tensor: PyTorch's logaddexp and sigmoid do on CPUs, in the last bit."""
    a, b, lse_a, lse_b = (torch.randn(shape) for shape in ((8, s, 5, 16), (8, s, 5, 16), (8, 5, s), (8, 5, s)))
    out, lse = fastok.merge_states(a, lse_a, b, lse_b)
    for i in range(8):
        alone, lse_alone = fastok.merge_states(*(x[i : i + 1].clone() for x in (a, lse_a, b, lse_b)))
        assert_same(alone, out[i : i + 1])
        assert_same(lse_alone, lse[i : i + 1])


@pytest.mark.parametrize("far", [1e3, 1e30])
def test_a_state_far_below_does_not_count(far: float) -> None:
    (a, lse_a), (b, lse_b) = split(sized(), [(0, 11), (11, 29)])
    for shift in (far, -far):
        out, lse = fastok.merge_states(a, lse_a + shift, b, lse_b)
        winner = (a, lse_a + shift) if shift > 0 else (b, lse_b)
        assert_same(out, winner[0])
        assert_same(lse, winner[1])


def test_merge_states_of_packed_sequences_and_in_either_order() -> None:
    case = packed((5, 0, 33), (9, 12, 30))
    (a, lse_a), (b, lse_b) = attend(case), attend(Case(case.q, case.k.roll(7, 0), case.v, case.mask))
    out, lse = fastok.merge_states(a, lse_a, b, lse_b)
    weight = torch.sigmoid(lse_a.double() - lse_b.double()).T[..., None]
    truth = torch.where(weight.isnan(), 0, weight * a + (1 - weight) * b)
    assert_accurate(out, truth, truth.float(), floor=torch.finfo().eps * torch.maximum(a.abs(), b.abs()))
    swapped, swapped_lse = fastok.merge_states(b, lse_b, a, lse_a)
    assert_accurate(swapped, truth, out)
    assert_same(swapped_lse, lse)


def test_gradients_of_merge_states() -> None:
    case = sized(batch=1, s=3, t=9, heads=2, groups=1, width=8)
    out_a, lse_a = (x.double().requires_grad_() for x in split(case, [(0, 4)])[0])
    out_b, lse_b = (x.double().requires_grad_() for x in split(case, [(4, 9)])[0])
    assert torch.autograd.gradcheck(torch.ops.fastok.merge_states, (out_a, lse_a, out_b, lse_b))


def test_gradients_of_merged_attention_are_those_of_the_whole() -> None:
    case = sized(key_bias=torch.zeros(2, 29))
    case.mask["key_bias"][0] = -math.inf  # the first sample sees nothing
    grad, grad_lse = torch.randn(2, 17, 4, 32), torch.randn(2, 4, 17)
    inputs = [x.requires_grad_() for x in case.qkv]

    def gradients(out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        seen = torch.where(lse == -math.inf, 0, lse)
        return torch.autograd.grad((out * grad).sum() + (seen * grad_lse).sum(), inputs)

    whole = gradients(*attend(case))
    bias = case.mask["key_bias"]
    (a, lse_a), (b, lse_b) = (
        fastok.attention(case.q, case.k[:, at], case.v[:, at], key_bias=bias[:, at])
        for at in (slice(0, 12), slice(12, 29))
    )
    for got, wanted in zip(gradients(*fastok.merge_states(a, lse_a, b, lse_b)), whole, strict=True):
        torch.testing.assert_close(got, wanted)


def test_no_sequences_at_all() -> None:
    empty = torch.zeros(0, 2, 8)
    out, lse = fastok.attention(empty, empty, empty, cu_seqlens_q=cu(), cu_seqlens_k=cu())
    assert out.shape == (0, 2, 8)
    assert lse.shape == (2, 0)
