"""What every reducer of a vision encoder's output promises, over all of them."""

import dataclasses
import importlib
import inspect
import re
from typing import Any

import pytest
import torch
from fastok import SoftMap, TokenMap, reducers
from fastok.reducers import (
    VTCCLS,
    AveragePool,
    DivPrune,
    FasterVLM,
    FlowCut,
    FoPru,
    FourierPool,
    GlobalCom2,
    HiPrune,
    HiRED,
    MMTok,
    RecoverableCompression,
    ToDRE,
    TokenContext,
    TokenCorr,
    VisionZip,
)
from fastok.testing import assert_same
from torch import Tensor

B, SIDE, N, C = 3, 6, 36, 16
REDUCERS: list[Any] = [
    DivPrune(9),
    DivPrune(9, compat=True),
    ToDRE(9),
    ToDRE(9, "max_min"),
    FasterVLM(9),
    VTCCLS(9),
    FoPru(9),
    FoPru(12, "row"),
    HiRED(0.25),
    GlobalCom2(0.25),
    GlobalCom2(9, compat=True),
    HiPrune(9, 0.6),
    HiPrune(9, 0.6, compat=True),
    FlowCut(9),
    VisionZip(6, 3),
    VisionZip(6, 3, "mean"),
    MMTok(9),
    RecoverableCompression(3),
    TokenCorr(0.3),
    AveragePool(4),
    FourierPool(9),
]
over_reducers = pytest.mark.parametrize("reducer", REDUCERS, ids=repr)
BUDGETS: dict[str, Any] = {"VisionZip": "dominant"}
SCORES = ("cls", "cls:logit", "cls:early", "cls:mid", "column", "column:mid", "column:deep")


def context(batch: int = B, protect: int = 0, n: int = N, **changes: Any) -> TokenContext:
    grid = (1, SIDE, n // SIDE)
    n += protect
    fields: dict[str, Any] = {
        "hidden": torch.randn(batch, n, C),
        "keys": torch.randn(batch, n, 2, 8),
        "values": torch.randn(batch, n, 2, 8),
        "scores": {name: torch.randn(batch, n).softmax(-1) for name in SCORES},
        "protect": protect,
        "grid": grid,
        "text": torch.randn(1, 5, C),
        "extra": {"vision": torch.randn(batch, n, 12), "vision_cls": torch.randn(batch, 12)},
    }
    return TokenContext(**fields | changes)


def over_fields(ctx: TokenContext, change: Any) -> TokenContext:
    """With ``change`` of every tensor that has a row for each sample."""

    def changed(x: Any) -> Any:
        if isinstance(x, dict):
            return {name: changed(value) for name, value in x.items()}
        return change(x) if isinstance(x, Tensor) and len(x) == len(ctx.hidden) else x

    return TokenContext(**{field.name: changed(getattr(ctx, field.name)) for field in dataclasses.fields(ctx)})


def result(reducer: Any, ctx: TokenContext) -> Tensor:
    """The map as a matrix."""
    return reducer(over_fields(ctx, lambda x: x)).dense()


def is_pruning(reducer: Any) -> bool:
    return type(reducer) not in (VisionZip, RecoverableCompression, AveragePool, FourierPool)


# ---- shapes and places ----------------------------------------------------------------------------------------------


@over_reducers
@pytest.mark.parametrize("protect", [0, 2])
def test_protected_tokens_come_first(reducer: Any, protect: int) -> None:
    ctx = context(protect=protect)
    reduction = reducer(ctx)
    merged, _ = reduction.merge(ctx.hidden)
    assert merged.shape[1] == reduction.n_out <= protect + N
    assert_same(merged[:, :protect], ctx.hidden[:, :protect])
    if is_pruning(reducer) and type(reducer) is not GlobalCom2:
        for row, count in zip(reduction.representative.tolist(), reduction.counts.tolist(), strict=True):
            assert row[:count] == sorted(row[:count])
            assert 0 < count < protect + N


@over_reducers
def test_published_budgets(reducer: Any) -> None:
    """How many tokens stay where the number does not depend on the data."""
    reduction = reducer(context())
    if type(reducer) in (RecoverableCompression, TokenCorr):
        assert isinstance(reduction, TokenMap)
        return
    wanted = {FoPru(12, "row"): 12}.get(reducer, 9)
    assert reduction.n_out == wanted
    if isinstance(reduction, TokenMap):
        assert reduction.counts.tolist() == [wanted] * B


@pytest.mark.parametrize("cls", sorted({type(reducer) for reducer in REDUCERS}, key=lambda cls: cls.__name__))
def test_defaults_and_files(cls: Any) -> None:
    """Frozen dataclasses with published defaults, exported, one file each, saying what they need."""
    assert dataclasses.is_dataclass(cls)
    assert getattr(reducers, cls.__name__) is cls
    assert cls() == cls()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(cls(), dataclasses.fields(cls)[0].name, 1)
    assert isinstance(cls().needs, tuple)
    source = inspect.getsource(importlib.import_module(cls.__module__))
    assert "arXiv" in source.split('"""')[1]
    assert all(f'"{need}"' in source or f"``{need}``" in source for need in cls().needs)
    doc = inspect.getdoc(cls) or ""
    assert all(f"{field.name}:" in doc for field in dataclasses.fields(cls))
    assert cls().reduces(0, 1)  # called without a model


@over_reducers
@pytest.mark.parametrize("crops", [(0, 0), (1, 2)])
def test_slots_are_filled_from_the_first(reducer: Any, crops: tuple[int, int]) -> None:
    """Whatever the map was made of without a check: every slot that is counted has a token, and no other has."""
    ctx = context()
    if not getattr(reducer, "whole_image", False):
        ctx.extra["crops"] = torch.tensor(crops)
    reduction = reducer(ctx)
    if isinstance(reduction, SoftMap):
        assert (reduction.dense() != 0).any(-1).all()
        return
    assert reduction.assign.shape == (B, N)
    for row, count in zip(reduction.assign.tolist(), reduction.counts.tolist(), strict=True):
        assert {slot for slot in row if slot >= 0} == set(range(count))
        assert count <= reduction.n_out
    checked = TokenMap.from_assign(reduction.assign, reduction.n_out, reduction.counts)
    assert_same(checked.members, reduction.members)


@pytest.mark.parametrize("reducer", [r for r in REDUCERS if not isinstance(r, (FlowCut, VisionZip))], ids=repr)
def test_protected_tokens_take_no_part(reducer: Any) -> None:
    """(For FlowCut and VisionZip they do: as the query, and as one of the dominant.)"""
    ctx = context(protect=2)
    without = over_fields(ctx, lambda x: x[:, 2:] if x.dim() > 1 and x.shape[1] == N + 2 else x)
    without.protect = 0
    reduced = result(reducer, ctx)
    assert_same(reduced[:, 2:, 2:], result(reducer, without))
    assert_same(reduced[:, :2, :2], torch.eye(2).expand(B, 2, 2))
    assert not reduced[:, 2:, :2].any()
    assert not reduced[:, :2, 2:].any()


# ---- budgets --------------------------------------------------------------------------------------------------------

budgeted = [
    reducer for reducer in REDUCERS if not isinstance(reducer, (RecoverableCompression, TokenCorr, AveragePool))
]


@pytest.mark.parametrize("reducer", budgeted, ids=repr)
@pytest.mark.parametrize("keep", [N, N + 1, 10**6, 1.0])
def test_a_budget_beyond_the_tokens_keeps_all(reducer: Any, keep: float) -> None:
    many = B * N if isinstance(reducer, HiRED) and keep == N else keep
    everything = dataclasses.replace(reducer, **{BUDGETS.get(type(reducer).__name__, "keep"): many})
    token_map = everything(context())
    assert isinstance(token_map, TokenMap)
    assert token_map.assign.tolist() == [list(range(N))] * B
    assert token_map.n_out == N


@pytest.mark.parametrize("reducer", budgeted, ids=repr)
@pytest.mark.parametrize(
    ("keep", "kind", "message"),
    [
        (0, ValueError, "must be at least one token, got 0"),
        (-3, ValueError, "must be at least one token, got -3"),
        (0.0, ValueError, r"must be above 0, got 0\.0"),
        (-0.5, ValueError, r"must be above 0, got -0\.5"),
        (1.5, TypeError, r"must be an int, or a fraction up to 1\.0; got float 1\.5"),
        (True, TypeError, r"must be an int, or a fraction up to 1\.0; got bool True"),
        ("64", TypeError, r"must be an int, or a fraction up to 1\.0; got str '64'"),
    ],
)
def test_bad_budgets(reducer: Any, keep: Any, kind: Any, message: str) -> None:
    name = BUDGETS.get(type(reducer).__name__, "keep")
    with pytest.raises(kind, match=f"{name} {message}"):
        dataclasses.replace(reducer, **{name: keep})


@pytest.mark.parametrize("reducer", budgeted, ids=repr)
def test_a_small_fraction_keeps_something(reducer: Any) -> None:
    if isinstance(reducer, FoPru) and reducer.strategy == "row":
        return
    smallest = dataclasses.replace(reducer, **{BUDGETS.get(type(reducer).__name__, "keep"): 1e-9})
    assert 1 <= smallest(context()).n_out <= 4  # VisionZip has three contextual tokens


# ---- what must be given ---------------------------------------------------------------------------------------------


@over_reducers
def test_what_is_missing_is_named(reducer: Any) -> None:
    for need in reducer.needs:
        ctx = context()
        if need in ("valid", "crops") or (need == "grid" and isinstance(reducer, (HiRED, GlobalCom2))):
            continue  # not cropped, not padded
        if need == "cls:early":
            ctx.extra["crops"] = torch.tensor([1, 2])
        for group in (ctx.scores, ctx.extra):
            group.pop(need, None)
        if need in ("keys", "values", "text", "grid"):
            setattr(ctx, need, None)
        named = need if need in ("keys", "values", "text", "grid") else rf'(scores|extra)\["{need}"\]'
        with pytest.raises(ValueError, match=rf"{type(reducer).__name__} needs {named}: TokenContext\(hidden=x, "):
            reducer(ctx)


@over_reducers
def test_what_does_not_fit_is_named(reducer: Any) -> None:
    for need in reducer.needs:
        ctx = context()
        if need in ctx.scores and not (isinstance(reducer, HiRED) and need == "cls:early"):
            ctx.scores[need] = torch.rand(B, N - 1)
            with pytest.raises(ValueError, match=rf"{need} must be \[B,N\] for hidden \[B,N,C\], here B=3, N=36; got"):
                reducer(ctx)
        if need in ("keys", "values"):
            setattr(ctx, need, torch.randn(B, N, 8))
            with pytest.raises(ValueError, match=rf"{need} must be \[B,N,G,D\] for hidden"):
                reducer(ctx)
        if need == "grid" and not isinstance(reducer, (HiRED, GlobalCom2)):
            for grid in ((6, 6), 36, (1, -6, -6)):
                ctx.grid = grid  # type: ignore[assignment]
                message = r"grid must be \(t, h, w\), none of them negative; got " + re.escape(repr(grid))
                with pytest.raises(ValueError, match=message):
                    reducer(ctx)
        if need == "vision":
            ctx.extra["vision"] = torch.randn(B, N + 1, 8)
            with pytest.raises(ValueError, match=r'extra\["vision"\] must be \[B,N,C_v\] for hidden'):
                reducer(ctx)


# ---- promises -------------------------------------------------------------------------------------------------------


@over_reducers
def test_inputs_stay_as_they_are(reducer: Any) -> None:
    ctx = context()
    before = over_fields(ctx, torch.clone)
    first = result(reducer, ctx)
    assert_same(result(reducer, ctx), first)
    for name in ("hidden", "keys", "values"):
        assert_same(getattr(ctx, name), getattr(before, name))
    for group in ("scores", "extra"):
        assert getattr(ctx, group).keys() == getattr(before, group).keys()
        for name, x in getattr(ctx, group).items():
            assert_same(x, getattr(before, group)[name])


@over_reducers
def test_samples_do_not_depend_on_their_batch(reducer: Any) -> None:
    ctx = context()
    together = result(reducer, ctx)
    for b in range(B):
        alone = result(reducer, over_fields(ctx, lambda x, b=b: x[b : b + 1]))
        torch.testing.assert_close(alone[0], together[b])


@pytest.mark.parametrize("reducer", [r for r in REDUCERS if is_pruning(r) and "grid" not in r.needs], ids=repr)
def test_a_permutation_of_the_tokens_permutes_what_is_kept(reducer: Any) -> None:
    ctx, order = context(), torch.randperm(N)
    kept = reducer(ctx).keep_mask
    shuffled = over_fields(ctx, lambda x: x[:, order] if x.dim() > 1 and x.shape[1] == N else x)
    assert_same(reducer(shuffled).keep_mask, kept[:, order])


@over_reducers
def test_equal_tokens_go_by_index(reducer: Any) -> None:
    """All alike: whatever is kept, the same places in every sample and every run, the first ones of a top-k."""
    ones = over_fields(context(), lambda x: torch.ones_like(x) if x.is_floating_point() else x)
    first = result(reducer, ones)
    assert_same(first, first[:1].expand_as(first))
    if isinstance(reducer, (FasterVLM, VTCCLS, FoPru, HiRED, GlobalCom2, FlowCut, MMTok)):
        kept = reducer(over_fields(ones, torch.clone)).keep_mask[0].nonzero()[:, 0].tolist()
        assert kept == list(range(len(kept)))


@over_reducers
def test_nan_is_kept_last(reducer: Any) -> None:
    """Tokens that are NaN throughout stay only where there are not enough others."""
    ctx, lost = context(), [1, 5, 30]

    def spoilt(x: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[1] != N:
            return x
        x = x.clone()
        x[:, lost] = torch.nan
        return x

    if not is_pruning(reducer):
        reducer(over_fields(ctx, spoilt))  # runs
        return
    kept = reducer(over_fields(ctx, spoilt)).keep_mask
    rows = set(range(0, 12)) | set(range(30, 36)) if reducer == FoPru(12, "row") else set(lost)
    assert not kept[:, sorted(rows)].any()
    assert kept.any(1).all()


@over_reducers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(reducer: Any, dtype: torch.dtype) -> None:
    """As the same numbers in fp32 (DivPrune as released measures distances in the dtype it is given)."""
    half = over_fields(context(), lambda x: x.to(dtype))
    reduction = reducer(over_fields(half, torch.clone))
    merged, _ = reduction.merge(half.hidden)
    assert merged.dtype == dtype
    if reducer != DivPrune(9, compat=True):
        torch.testing.assert_close(reduction.dense(), result(reducer, over_fields(half, torch.Tensor.float)))


@over_reducers
def test_strides_do_not_matter(reducer: Any) -> None:
    ctx = context()

    def strided(x: Tensor) -> Tensor:
        if x.dim() < 2:
            return x
        return torch.stack([x, x], 2)[:, :, 0] if x.dim() == 2 else torch.cat([x, x], -1)[..., : x.shape[-1]]

    assert_same(result(reducer, over_fields(ctx, strided)), result(reducer, ctx))


@over_reducers
def test_no_samples_no_tokens_one_token(reducer: Any) -> None:
    for batch, n in ((0, N), (2, 0), (2, 1)):
        ctx = context(batch, n=n)
        ctx.grid = (1, 1, n) if n < N else ctx.grid
        reduction = reducer(ctx)
        assert reduction.merge(ctx.hidden)[0].shape == (batch, min(n, reduction.n_out), C)
        if n == 1:
            assert (reduction.merge(ctx.hidden)[1] == 1).all()


@over_reducers
def test_gradients_flow_through_tokens_only(reducer: Any) -> None:
    ctx = over_fields(context(), lambda x: x.requires_grad_() if x.is_floating_point() else x)
    for x in ctx.scores.values():
        assert x.requires_grad
    reduction = reducer(ctx)
    reduction.merge(ctx.hidden)[0].sum().backward()
    assert ctx.hidden.grad is not None
    assert all(x.grad is None for x in (ctx.keys, ctx.values, *ctx.scores.values()))


COMPILED = [reducer for reducer in REDUCERS if not isinstance(reducer, FlowCut)]  # which reads how many to keep


@pytest.mark.parametrize("reducer", COMPILED, ids=repr)
def test_compiles_without_graph_breaks(reducer: Any) -> None:
    torch._dynamo.reset()
    ctx = context(protect=1)

    def reduce(
        hidden: Tensor, keys: Tensor, scores: dict[str, Tensor], text: Tensor, extra: dict[str, Tensor]
    ) -> Tensor:
        shown = TokenContext(hidden, keys, scores=scores, protect=1, grid=ctx.grid, text=text, extra=extra)
        return reducer(shown).merge(hidden)[0]

    arguments = (ctx.hidden, ctx.keys, ctx.scores, ctx.text, ctx.extra)
    compiled = torch.compile(reduce, fullgraph=True, backend="eager")
    assert_same(compiled(*arguments), reduce(*arguments))


def test_in_an_encoder_alone_in_the_last_layer() -> None:
    for reducer in REDUCERS:
        if not isinstance(reducer, FlowCut):
            assert [layer for layer in range(12) if reducer.reduces(layer, 12)] == [11]


def test_maps_without_weights_are_token_maps() -> None:
    for reducer in REDUCERS:
        soft = isinstance(reducer, FourierPool) or reducer == VisionZip(6, 3)
        assert isinstance(reducer(context()), SoftMap if soft else TokenMap)


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"hidden": None}, TypeError, "hidden must be a tensor, got NoneType"),
        ({"hidden": torch.zeros(5, 8)}, ValueError, r"hidden must have shape \[B,N,C\]"),
        ({"protect": 6}, ValueError, r"protect must be within \[0, N=5\], got 6"),
        ({"protect": -1}, ValueError, "protect must be >= 0, got -1"),
    ],
)
def test_bad_contexts(fields: dict[str, Any], kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        TokenContext(**{"hidden": torch.zeros(2, 5, 8)} | fields)
