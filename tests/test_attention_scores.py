"""attention_scores and attention_with_scores: every field of ScoreSpec with every mask, on every backend."""

import math
from dataclasses import fields
from itertools import combinations
from random import Random
from typing import Any

import fastok
import pytest
import torch
from attention_cases import (
    DTYPES,
    MASKS,
    SLOW,
    Case,
    dense_attention,
    dense_scores,
    in_fp64,
    over_masks,
    packed,
    parts,
    sized,
    some_masks,
    through,
)
from attention_cases import one_thread as one_thread
from fastok import ScoreSpec
from fastok.testing import Backend, assert_accurate, assert_same, over_backends
from fastok.testing.examples.attention import hidden_bias, odd_heads
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

over_scores = over_backends("attention_scores", without=("reference",))
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

LISTED = torch.tensor([2, 0, 2, 11, 16])  # one twice
FIELDS: dict[str, tuple[Any, ...]] = {
    "rows": ("all", "last", 3, -2, (2, 9), (-4, None), (1, -1), (-6, -3), LISTED),
    "cols": (None, (3, 11), (-9, None)),
    "reduce": ("sum", "mean", "max", "none"),
    "normalize": (None, "visible", "causal", "cols"),
    "heads": ("none", "mean", "sum", "max", "group_mean", "group_sum"),
    "logits": (False, True),
    "value_norm": (None, "l1", "l2"),
    "pool": (None, 1, 3, 7),
}
FACTORS: dict[str, tuple[Any, ...]] = {
    "mask": tuple(MASKS),
    **FIELDS,
    "lse": ("given", "computed"),
    "dtype": DTYPES,
}
Choice = tuple[int, ...]  # of each factor, which value


def possible(choice: Choice) -> bool:
    """Whether the fields go together."""
    of = {name: values[i] for (name, values), i in zip(FACTORS.items(), choice, strict=True)}
    s = MASKS[of["mask"]]().q.shape[-3]
    in_pack = of["mask"].startswith("packed")
    if of["logits"] and of["normalize"] == "cols":
        return False
    if of["normalize"] == "cols" and of["lse"] == "given":
        return False  # not used
    if in_pack:
        return of["cols"] is None and not (of["reduce"] == "none" and of["rows"] in ("all", (1, -1)))
    if isinstance(of["rows"], Tensor):
        return s > int(LISTED.max())
    return not isinstance(of["rows"], int) or s > abs(of["rows"])


def pairwise_cover() -> list[Choice]:
    """Choices in which every possible pair of values of two factors occurs: greedy, repeatable."""
    random = Random(0)
    sizes = [len(values) for values in FACTORS.values()]

    def pairs(choice: Choice) -> set[tuple[int, int, int, int]]:
        return {(a, choice[a], b, choice[b]) for a, b in combinations(range(len(sizes)), 2)}

    def drawn(fixed: dict[int, int]) -> Choice | None:
        for _ in range(60):
            choice = tuple(fixed.get(i, random.randrange(size)) for i, size in enumerate(sizes))
            if possible(choice):
                return choice
        return None

    missing = [
        (a, x, b, y) for a, b in combinations(range(len(sizes)), 2) for x in range(sizes[a]) for y in range(sizes[b])
    ]
    left, chosen = set(missing), []
    for a, x, b, y in missing:
        if (a, x, b, y) in left:
            found = [choice for choice in (drawn({a: x, b: y}) for _ in range(12)) if choice is not None]
            if found:
                chosen.append(max(found, key=lambda choice: len(pairs(choice) & left)))
                left -= pairs(chosen[-1])
    return chosen


def prepared(choice: Choice) -> tuple[str, Case, ScoreSpec, str]:
    of = {name: values[i] for (name, values), i in zip(FACTORS.items(), choice, strict=True)}
    torch.manual_seed(hash(choice[:1]) % 1000)
    case = MASKS[of["mask"]]().to(of["dtype"])
    return of["mask"], case, ScoreSpec(**{name: of[name] for name in FIELDS}), of["lse"]


@pytest.fixture(scope="module")
def cover() -> dict[str, list[Choice]]:
    """The choices of :func:`pairwise_cover` by mask."""
    by_mask: dict[str, list[Choice]] = {mask: [] for mask in MASKS}
    for choice in pairwise_cover():
        by_mask[tuple(MASKS)[choice[0]]].append(choice)
    return by_mask


def scores_of(case: Case, spec: ScoreSpec, **more: Any) -> Tensor:
    v = case.v if spec.value_norm else None
    return fastok.attention_scores(case.q, case.k, v=v, spec=spec, **more, **case.mask)


def scores_on(backend: Backend, case: Case, spec: ScoreSpec, check: bool = True, **more: Any) -> Tensor:
    with through(backend, check):
        return scores_of(case, spec, **more)


# ---- what scores are -------------------------------------------------------------------------------------------------


def test_fields_are_those_of_the_specification() -> None:
    assert [field.name for field in fields(ScoreSpec)] == list(FIELDS)
    assert ScoreSpec() == ScoreSpec(**{name: values[0] for name, values in FIELDS.items()} | {"heads": "mean"})


@over_masks
def test_specification_is_the_text(cover: dict[str, list[Choice]], mask: str) -> None:
    """In fp64, against the dense matrix and api.md's words; value norms are in fp32."""
    for choice in cover[mask]:
        _, case, spec, _ = prepared(choice)
        with in_fp64():
            got = scores_of(case, spec)
        torch.testing.assert_close(got.float(), dense_scores(case, spec).float(), msg=lambda m, s=spec: f"{s}: {m}")


@over_masks
@over_scores
def test_every_pair_of_mask_and_fields(backend: Backend, cover: dict[str, list[Choice]], mask: str) -> None:
    some_masks(backend, mask)
    for choice in cover[mask][: 3 if backend.name in SLOW else None]:
        _, case, spec, lse = prepared(choice)
        given_lse = fastok.attention(*case.qkv, **case.mask)[1] if lse == "given" else None
        scores = scores_on(backend, case, spec, lse=given_lse)
        assert scores.dtype == torch.float32
        assert scores.shape == dense_scores(case, spec).shape


@given(
    batch=st.integers(0, 3), s=st.integers(0, 40), t=st.integers(0, 70), groups=st.integers(1, 3),
    ratio=st.integers(1, 4), width=st.integers(1, 32), left=st.integers(-1, 50), right=st.integers(-1, 50),
    biased=st.sampled_from([None, "sample", "head"]), start=st.integers(-50, 50), stop=st.integers(-50, 50),
    first=st.integers(-80, 80), reduce=st.sampled_from(FIELDS["reduce"]), heads=st.sampled_from(FIELDS["heads"]),
    normalize=st.sampled_from(FIELDS["normalize"]), logits=st.booleans(), value_norm=st.sampled_from([None, "l2"]),
    pool=st.sampled_from([None, 5]), seed=st.integers(0, 1000), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
@over_backends("attention_scores", without=("reference", "cuda", *SLOW))
def test_any_shape(
    backend: Backend, batch, s, t, groups, ratio, width, left, right, biased, start, stop, first, reduce, heads,
    normalize, logits, value_norm, pool, seed, dtype,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    case = sized(batch, s, t, groups * ratio, groups, 8 * width, window=(left, right)).to(dtype)
    if biased:
        case.mask["key_bias"] = hidden_bias(batch, t) if biased == "sample" else hidden_bias(batch, groups * ratio, t)
    spec = ScoreSpec(
        (start, stop), (first, None), reduce, None if logits and normalize == "cols" else normalize, heads, logits,
        value_norm, pool,
    )  # fmt: skip
    scores = scores_on(backend, case, spec)
    if batch:
        assert scores.shape == dense_scores(case, spec).shape


# ---- sums that are known ---------------------------------------------------------------------------------------------

ALL_HEADS = ScoreSpec(heads="none")


@over_dtypes
@over_masks
@over_scores
def test_sums_count_the_rows_that_see_something(backend: Backend, mask: str, dtype: torch.dtype) -> None:
    some_masks(backend, mask)
    case = MASKS[mask]().to(dtype)
    sums = scores_on(backend, case, ALL_HEADS, check=False).double()
    _, lse = dense_attention(case)
    rows = (lse > -math.inf).sum(-1).double()
    # Each of a row's probabilities errs by a rounding of its logit, and these all add up at worst.
    largest = lse[lse > -math.inf].abs().max() + case.q.shape[-1] ** 0.5
    assert ((sums.sum(-1) - rows).abs() <= rows * largest * torch.finfo().eps).all()


@over_scores
def test_visible_makes_uniform_attention_flat(backend: Backend) -> None:
    for mask in ({}, {"causal": True}, {"window": (3, 2)}):
        case = sized(s=29, t=29, **mask)
        case.q.zero_()
        once = scores_on(backend, case, ScoreSpec(normalize="visible", logits=True), check=False)
        assert (once == 0).all()
        case.mask["key_bias"] = torch.full((2, 29), 0.5)
        flat = scores_on(backend, case, ScoreSpec(normalize="visible", logits=True), check=False)
        assert_accurate(flat, torch.full((2, 29), 0.5, dtype=torch.float64), torch.full((2, 29), 0.5))


@over_scores
def test_visible_divides_by_the_rows_that_can_see(backend: Backend) -> None:
    case = sized(s=20, t=33, causal=True)
    sums, normalized = (scores_on(backend, case, ScoreSpec(normalize=by)) for by in (None, "visible"))
    count = [sum(j <= i + 13 for i in range(20)) for j in range(33)]
    assert_same(normalized, sums / torch.tensor(count))


@over_scores
def test_causal_divides_as_zipcache_does(backend: Backend) -> None:
    case = sized(s=33, t=33, causal=True)
    sums, normalized = (scores_on(backend, case, ScoreSpec(normalize=by)) for by in (None, "causal"))
    assert_same(normalized, sums / torch.arange(33, 0, -1))


@over_scores
def test_last_row_is_the_row_of_a_matrix(backend: Backend) -> None:
    case = sized(heads=8, s=17, t=29)
    every = scores_on(backend, case, ScoreSpec(reduce="none", heads="none"))
    assert every.shape == (2, 8, 17, 29)
    for rows, at in (("last", 16), (-1, 16), (5, 5), ((7, 8), 7), (torch.tensor([9]), 9)):
        for reduce in ("sum",) if backend.name in SLOW else ("sum", "max", "mean"):
            row = scores_on(backend, case, ScoreSpec(rows, reduce=reduce, heads="none"))
            torch.testing.assert_close(row, every[:, :, at])


@over_scores
def test_repeated_rows_count_twice(backend: Backend) -> None:
    case = sized(causal=True)
    twice, once = (
        scores_on(backend, case, ScoreSpec(torch.tensor(rows), heads="none", reduce="sum")) for rows in ([4, 4], [4])
    )
    torch.testing.assert_close(twice, 2 * once)
    backwards, forwards = (
        scores_on(backend, case, ScoreSpec(torch.tensor(rows), heads="none", reduce="none"))
        for rows in ([6, 1], [1, 6])
    )
    torch.testing.assert_close(backwards, forwards.flip(2))


# ---- the log-sum-exp of others, several specs, packed ----------------------------------------------------------------


@over_dtypes
@over_scores
def test_torchs_own_lse_gives_the_same_scores(backend: Backend, dtype: torch.dtype) -> None:
    case = sized(s=40, t=40, heads=4, groups=4, width=64, causal=True).to(dtype)
    q, k, v = (x.transpose(1, 2) for x in case.qkv)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
    for spec in (ScoreSpec(), ScoreSpec("last", heads="none"), ScoreSpec((-8, None), reduce="max")):
        own = scores_on(backend, case, spec)
        foreign = scores_on(backend, case, spec, lse=flash[1])
        # Two fp32 log-sum-exps differ by their roundings, and scores by as many in proportion.
        apart = float((flash[1] - fastok.attention(*case.qkv, **case.mask)[1]).abs().max()) + torch.finfo().eps
        assert_accurate(foreign, dense_scores(case, spec), own, floor=2 * apart * own)


@over_masks
@over_scores
def test_with_scores_is_attention_and_scores(backend: Backend, mask: str) -> None:
    some_masks(backend, mask)
    case = MASKS[mask]().to(torch.bfloat16)
    specs = (ScoreSpec(reduce="max", value_norm="l1"), ScoreSpec(), ScoreSpec("last", heads="group_mean"))
    specs = specs[: 1 if backend.name in SLOW else None]
    with through(backend, check=False):
        out, lse, scores = fastok.attention_with_scores(*case.qkv, scores=specs, **case.mask)
        wanted_out, wanted_lse = fastok.attention(*case.qkv, **case.mask)
        assert_same(out, wanted_out)
        assert_same(lse, wanted_lse)
        assert len(scores) == len(specs)
        for got, spec in zip(scores, specs, strict=True):
            assert_same(got, scores_of(case, spec, lse=lse))
        assert fastok.attention_with_scores(*case.qkv, scores=(), **case.mask)[2] == ()


@over_masks
@over_scores
def test_with_scores_over_their_own_columns(backend: Backend, mask: str) -> None:
    """A softmax over the selected columns takes a pass of its own over the keys, which has no values."""
    some_masks(backend, mask)
    case = MASKS[mask]()
    cols = (None,) if "cu_seqlens_k" in case.mask else (None, (3, 11))
    for spec in (ScoreSpec(cols=part, normalize="cols", heads="none") for part in cols):
        with through(backend, check=False):
            out, lse, (scores,) = fastok.attention_with_scores(*case.qkv, scores=(spec,), **case.mask)
            assert_same(scores, scores_of(case, spec))
            wanted_out, wanted_lse = fastok.attention(*case.qkv, **case.mask)
        assert_same(out, wanted_out)
        assert_same(lse, wanted_lse)
        torch.testing.assert_close(scores, dense_scores(case, spec).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", [{"causal": True}, {"window": (70, 5), "softcap": 4.0}], ids=("causal", "window"))
@over_dtypes
@over_backends("attention_with_scores", without=("reference", "triton-interpreter", "cuda-on-host"))
def test_scores_made_while_attending_are_the_same(backend: Backend, dtype: torch.dtype, mask: dict[str, Any]) -> None:
    """On the CPU the first statistic may come from the tasks that attend: all rows of a head, or a window of them."""
    case = sized(s=200, t=230, heads=4, groups=2, width=64, **mask).to(dtype)
    specs = [
        ScoreSpec(rows, heads=heads, value_norm=norm)
        for rows, heads, norm in (
            ("all", "mean", None), ("last", "none", None), ((-64, None), "group_sum", "l2"), ((40, 150), "sum", "l1"),
            ((0, 1), "group_mean", None), ((60, 70), "none", "l1"), ((5, 5), "mean", None),
        )
    ]  # fmt: skip
    for threads in (1, 2, 3):  # the first two have enough heads each for a task to take all rows of one
        torch.set_num_threads(threads)  # and afterwards what it was: one_thread
        with through(backend, check=False):
            wanted_out, wanted_lse = fastok.attention(*case.qkv, **case.mask)
            for spec in specs:
                out, lse, (scores,) = fastok.attention_with_scores(*case.qkv, scores=(spec,), **case.mask)
                assert_same(out, wanted_out)
                assert_same(lse, wanted_lse)
                assert_same(scores, scores_of(case, spec, lse=lse))


@over_scores
def test_packed_equals_each_sequence(backend: Backend) -> None:
    case = packed((5, 0, 33, 8), (9, 12, 40, 8), behind=3, causal=True)
    starts_q, starts_k = case.mask["cu_seqlens_q"].tolist(), case.mask["cu_seqlens_k"].tolist()
    specs = (
        ScoreSpec((-4, None), reduce="mean", normalize="visible"),
        ScoreSpec(normalize="causal", heads="group_sum", pool=3),
        ScoreSpec(),
        ScoreSpec("last", heads="none"),
        ScoreSpec(reduce="max", pool=5),
        ScoreSpec(logits=True, reduce="max"),
    )
    for spec in specs[: 2 if backend.name in SLOW else None]:
        scores = scores_on(backend, case, spec)
        for i in range(4):
            of_q, of_k = slice(*starts_q[i : i + 2]), slice(*starts_k[i : i + 2])
            alone = Case(case.q[None, of_q], case.k[None, of_k], case.v[None, of_k], {"causal": True})
            torch.testing.assert_close(scores[..., of_k], scores_on(backend, alone, spec)[0])
        assert not scores[..., starts_k[-1] :].isnan().any()


# ---- hard numbers, layouts, promises ---------------------------------------------------------------------------------


@over_dtypes
@over_scores
def test_logits_of_plus_and_minus_200(backend: Backend, dtype: torch.dtype) -> None:
    case = sized(width=64, scale=1.0)
    case.q.sign_()
    case.k.copy_(case.q[:, :1, :1] * torch.linspace(-200 / 64, 200 / 64, 29)[None, :, None, None])
    for spec in (ScoreSpec(), ScoreSpec(reduce="max", logits=True), ScoreSpec(cols=(0, 9), normalize="cols")):
        scores_on(backend, case.to(dtype), spec)


@over_scores
def test_nan_stays_in_its_row_and_its_column_scores(backend: Backend) -> None:
    """A NaN row has NaN scores for the keys that it sees; for those that it does not, NaN or what they were."""
    case = sized(s=40, t=50, width=64, causal=True)
    specs = (ScoreSpec(heads="none"), ScoreSpec(heads="none", reduce="none"), ScoreSpec((0, 5), heads="none"))
    clean = [scores_on(backend, case, spec) for spec in specs]
    case.q[0, 7, 1] = math.nan  # sees keys 0 to 17
    sums, rows, others = (scores_on(backend, case, spec, check=False) for spec in specs)
    assert_same(others, clean[2])
    for got, wanted in ((sums[0, 1], clean[0][0, 1]), (rows[0, 1, 7], clean[1][0, 1, 7])):
        assert got[:18].isnan().all()
        assert ((got[18:] == wanted[18:]) | got[18:].isnan()).all()
        got.copy_(wanted)
    assert_same(sums, clean[0])
    assert_same(rows, clean[1])


@over_dtypes
@over_scores
def test_views(backend: Backend, dtype: torch.dtype) -> None:
    case = sized(s=19, t=35, heads=6, groups=2, width=40, causal=True, key_bias=torch.randn(2, 6, 35)).to(dtype)
    lse = fastok.attention(*case.qkv, **case.mask)[1]
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.qkv]
    wide = torch.randn(2, 6, 70)
    wide[..., ::2] = case.mask["key_bias"]
    for spec in (ScoreSpec(heads="group_sum", value_norm="l2"), ScoreSpec((4, 9), (5, 30), "max")):
        wanted = scores_on(backend, case, spec, lse=lse)
        for q, k, v in (heads_first, [odd_heads(x) for x in case.qkv]):
            view = Case(q, k, v, {**case.mask, "key_bias": wide[..., ::2]})
            assert_same(scores_on(backend, view, spec, lse=lse.mT.contiguous().mT), wanted)


@pytest.mark.parametrize("mask", ["causal-S<T", "bias-heads", "several-tiles", "one-row"])
@over_backends("attention_scores", without=("reference", "triton-interpreter"))
def test_batch_invariant_and_repeatable(backend: Backend, mask: str) -> None:
    some_masks(backend, mask)
    case = MASKS[mask]().to(torch.bfloat16)
    bias = case.mask.get("key_bias")
    repeat = {**case.mask, "key_bias": None if bias is None else bias.repeat(3, *([1] * (bias.dim() - 1)))}
    bigger = Case(*(x.repeat(3, 1, 1, 1) for x in case.qkv), repeat)
    for spec in (ScoreSpec(), ScoreSpec("last", heads="none"), ScoreSpec(reduce="max", heads="group_sum", pool=3)):
        first = scores_on(backend, case, spec, check=False)
        assert_same(scores_on(backend, case, spec, check=False), first)
        many = scores_on(backend, bigger, spec, check=False)
        assert_same(many, first.repeat(3, *([1] * (first.dim() - 1))))


def test_thread_count_does_not_change_results() -> None:
    cases = [make().to(dtype) for make in MASKS.values() for dtype in (torch.float32, torch.bfloat16)]
    specs = (ScoreSpec(), ScoreSpec("last", heads="none"), ScoreSpec(reduce="max", value_norm="l1"))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)  # and afterwards what it was: one_thread
        results.append([scores_of(case, spec) for case in cases for spec in specs])
    for other in results[1:]:
        for part, wanted in zip(other, results[0], strict=True):
            assert_same(part, wanted)


def test_scores_are_not_differentiable_and_the_rest_is() -> None:
    case = sized(causal=True, key_bias=torch.randn(2, 29).requires_grad_())
    inputs = [x.requires_grad_() for x in case.qkv]
    out, lse, (scores, weighted) = fastok.attention_with_scores(
        *inputs, scores=(ScoreSpec(), ScoreSpec(value_norm="l2")), **case.mask
    )
    assert [x.requires_grad for x in (out, lse, scores, weighted)] == [True, True, False, False]
    assert not scores_of(case, ScoreSpec(), lse=lse).requires_grad
    got = torch.autograd.grad(out.sum() + lse.sum(), [*inputs, case.mask["key_bias"]])
    plain, plain_lse = fastok.attention(*inputs, **case.mask)
    wanted = torch.autograd.grad(plain.sum() + plain_lse.sum(), [*inputs, case.mask["key_bias"]])
    for part, other in zip(got, wanted, strict=True):
        assert_same(part, other)
    assert all(isinstance(part, Tensor) for part in parts((out, lse, scores)))
