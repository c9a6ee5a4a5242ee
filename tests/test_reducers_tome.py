"""ToMe without any model, against the published matching written out as loops (which the model tests use as well)."""

import dataclasses

import pytest
import torch
from fastok import TokenMap
from fastok.reducers import TokenContext, ToMe
from fastok.reducers.tome import schedule
from fastok.testing import assert_same
from torch import Tensor


def published_groups(metric: Tensor, r: int, protect: int) -> list[list[int]]:
    """The published matching of one sample's ``metric[N,D]``: the members of each output token, in output order."""
    n = metric.shape[0]
    r = min(r, (n - protect) // 2)
    if r <= 0:
        return [[i] for i in range(n)]
    unit = metric / metric.norm(dim=-1, keepdim=True)
    scores = unit[0::2] @ unit[1::2].T
    scores[: (protect + 1) // 2] = -torch.inf  # protected tokens at even positions
    scores[:, : protect // 2] = -torch.inf  # and at odd ones
    best, mate = scores.max(-1)
    order = best.argsort(descending=True, stable=True).tolist()
    merged, unmerged = order[:r], order[r:]
    if protect:
        unmerged.sort()
    heads = [[2 * i] for i in unmerged]
    for j in range(scores.shape[1]):
        heads.append([2 * j + 1] + [2 * i for i in merged if mate[i] == j])
    special = [group for group in heads if group[0] < protect]
    return sorted(special) + [group for group in heads if group[0] >= protect]


def published_merge(x: Tensor, size: Tensor, groups: list[list[list[int]]]) -> tuple[Tensor, Tensor]:
    """The size-weighted mean of each group of ``x[B,N,C]``, and the sizes' sums."""
    member = torch.zeros(len(groups), len(groups[0]), x.shape[1], dtype=x.dtype)
    for b, of_sample in enumerate(groups):
        for slot, group in enumerate(of_sample):
            member[b, slot, group] = 1
    sums = member @ size[..., None]
    return (member * size[:, None]) @ x / sums, sums[..., 0]


def assign_of(groups: list[list[list[int]]], n: int) -> Tensor:
    assign = torch.full((len(groups), n), -1, dtype=torch.int32)
    for b, of_sample in enumerate(groups):
        for slot, group in enumerate(of_sample):
            assign[b, group] = slot
    return assign


def context(
    batch: int = 2, n: int = 50, heads: int = 3, dtype: torch.dtype = torch.float32, **more: int
) -> TokenContext:
    return TokenContext(torch.randn(batch, n, 24, dtype=dtype), torch.randn(batch, n, heads, 8, dtype=dtype), **more)


# ---- schedule -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("r", "n_layers", "expected"),
    [
        (16, 4, [16, 16, 16, 16]),
        ([8, 4], 4, [8, 4, 0, 0]),
        ([8, 4, 2], 2, [8, 4, 2]),
        ([], 2, [0, 0]),
        ((16, 0.0), 3, [16, 16, 16]),
        ((10, -1.0), 5, [20, 15, 10, 5, 0]),
        ((10, 1.0), 5, [0, 5, 10, 15, 20]),
        ((13, -1.0), 12, [26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0]),
        ((5, 0.5), 4, [2, 4, 6, 8]),
        ((7, 1), 1, [0]),
        (7, 1, [7]),
    ],
)
def test_schedules(r: object, n_layers: int, expected: list[int]) -> None:
    assert schedule(r, n_layers) == expected


def test_a_layer_indexes_the_schedule_and_keeps_no_state() -> None:
    reducer = ToMe([8, 0, 3])
    ctx = context(n_layers=4)
    for _ in range(2):
        for layer, removed in enumerate([8, 0, 3, 0]):
            ctx.layer = layer
            assert reducer(ctx).n_out == 50 - removed
            assert reducer.reduces(layer, 4) == (removed > 0)
    assert reducer == ToMe([8, 0, 3])


# ---- the map --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protect", [0, 1, 2, 5])
@pytest.mark.parametrize(("n", "r"), [(50, 9), (49, 16), (50, 500), (5, 1), (1, 3)])
def test_map_is_the_published_one(n: int, r: int, protect: int) -> None:
    ctx = context(n=n, protect=min(protect, n))
    token_map = ToMe(r)(ctx)
    groups = [published_groups(metric, r, ctx.protect) for metric in ctx.keys.mean(2)]
    assert token_map.n_out == n - min(r, (n - ctx.protect) // 2)
    assert_same(token_map.assign, assign_of(groups, n))


def test_works_without_a_model_on_hidden_and_keys_alone() -> None:
    token_map = ToMe(r=16)(TokenContext(hidden=torch.randn(1, 49, 8), keys=torch.randn(1, 49, 2, 4)))
    assert isinstance(token_map, TokenMap)
    assert token_map.n_out == 33


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keys(dtype: torch.dtype) -> None:
    ctx = context(dtype=dtype, protect=1)
    groups = [published_groups(metric.float(), 8, 1) for metric in ctx.keys.mean(2)]
    assert_same(ToMe(8)(ctx).assign, assign_of(groups, 50))


def test_protected_tokens_stay_first_and_alone() -> None:
    token_map = ToMe(100)(context(protect=3))
    assert_same(token_map.assign[:, :3], torch.arange(3, dtype=torch.int32).expand(2, 3))
    assert (token_map.assign[:, 3:] >= 3).all()


def test_no_gradient_flows_through_the_choice() -> None:
    ctx = context()
    ctx.keys.requires_grad_()
    ctx.hidden.requires_grad_()
    ToMe(8)(ctx).merge(ctx.hidden)[0].sum().backward()
    assert ctx.keys.grad is None
    assert ctx.hidden.grad is not None


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("r", "kind", "message"),
    [
        (-1, ValueError, "r must be >= 0, got -1"),
        ([4, -2], ValueError, "got -2"),
        (1.5, TypeError, "1.5"),
        (True, TypeError, "True"),
        ("16", TypeError, "'16'"),
        ([1, 2.0], TypeError, "r must be an int"),
        ((8, 2.0), ValueError, r"inflection must be within \[-1, 1\], got 2.0"),
        ((8, 4, 2), TypeError, "give a list"),
        ((8.0, 1.0), TypeError, "r must be an int"),
    ],
)
def test_bad_r(r: object, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        ToMe(r)


def test_bad_context() -> None:
    hidden = torch.randn(1, 9, 8)
    with pytest.raises(ValueError, match="ToMe needs keys"):
        ToMe(2)(TokenContext(hidden))
    with pytest.raises(ValueError, match=r"keys must be \[B,N,G,D\]"):
        ToMe(2)(TokenContext(hidden, torch.randn(1, 9, 8)))
    with pytest.raises(ValueError, match=r"keys must be \[B,N,G,D\]"):
        ToMe(2)(TokenContext(hidden, torch.randn(1, 8, 2, 4)))
    with pytest.raises(ValueError, match="layer must be within"):
        ToMe(2)(TokenContext(hidden, torch.randn(1, 9, 2, 4), layer=1))


def test_is_frozen_and_says_what_it_needs() -> None:
    assert ToMe.needs == ("keys",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        ToMe(8).r = 9
