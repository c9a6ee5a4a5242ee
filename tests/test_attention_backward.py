"""Gradients of attention: the flat op on every backend, and autograd against a dense formula in fp64."""

import math
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
    flat,
    in_fp64,
    over_masks,
    sized,
    some_masks,
)
from attention_cases import one_thread as one_thread
from fastok import ScoreSpec, _library, reference
from fastok.testing import Backend, assert_same, over_backends
from fastok.testing.examples import verify
from torch import Tensor

over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Without a native kernel all instruction sets run the same matrix products of torch.
ONCE = (
    ()
    if "attention_backward" in _library.NATIVE["CPU"]
    else ("cpu-baseline", "cpu-avx2", "cpu-avx512", "cpu-avx512_bf16")
)
over_backward = over_backends("attention_backward", without=("reference", *ONCE))


def backward_arguments(case: Case, with_lse: bool = True) -> tuple[Any, ...]:
    """The flat arguments of ``attention_backward`` for random gradients."""
    q, k, v, *mask = flat(fastok.attention, *case.qkv, **case.mask)
    out, lse = torch.ops.fastok.attention(q, k, v, *mask)
    return torch.randn(out.shape).to(q.dtype), torch.randn(lse.shape) if with_lse else None, q, k, v, out, lse, *mask


@over_dtypes
@over_masks
@over_backward
def test_masks(backend: Backend, mask: str, dtype: torch.dtype) -> None:
    some_masks(backend, mask)
    for with_lse in (False, True):
        arguments = backward_arguments(MASKS[mask]().to(dtype), with_lse)
        try:
            result = backend.attention_backward(*arguments)
        except AttributeError:
            pytest.skip(f"{backend.name} has no attention_backward")
        verify("attention_backward", arguments, result)


@over_masks
def test_autograd_is_the_gradient_of_the_dense_formula(mask: str) -> None:
    """In fp64, for q, k, v and the bias, through out and lse."""
    case = MASKS[mask]()
    bias = case.mask.get("key_bias")
    inputs = [*case.qkv, *([] if bias is None else [bias])]
    exact = [x.double().requires_grad_() for x in inputs]
    dense = Case(*exact[:3], {**case.mask, "key_bias": exact[3] if bias is not None else None})
    out, lse = dense_attention(dense)
    grad_out, grad_lse = torch.randn(out.shape).double(), torch.randn(lse.shape).double()
    seen = lse > -math.inf
    wanted = torch.autograd.grad((out * grad_out).sum() + (lse[seen] * grad_lse[seen]).sum(), exact)
    q, k, v, *rest = flat(fastok.attention, *case.qkv, **case.mask)
    rest[4] = None if bias is None else bias.double()
    own = (x.double() for x in (q, k, v))
    with in_fp64():
        finished = fastok.attention(q, k, v, **case.mask)
    got = reference.attention.attention_backward(grad_out, grad_lse, *own, *finished, *rest)
    for part, expected in zip(got, wanted, strict=False):
        torch.testing.assert_close(part, expected)


@over_dtypes
@pytest.mark.parametrize("mask", ["causal-S>T", "bias-heads", "packed-bias", "softcap-bias-window", "mqa-two-widths"])
def test_autograd_calls_the_op(mask: str, dtype: torch.dtype) -> None:
    case = MASKS[mask]().to(dtype)
    inputs = [x.requires_grad_() for x in case.qkv]
    bias = case.mask.get("key_bias")
    if bias is not None:
        inputs.append(bias.requires_grad_())
    out, lse = fastok.attention(*case.qkv, **case.mask)
    grad_out, grad_lse = torch.randn(out.shape).to(dtype), torch.randn(lse.shape)
    got = torch.autograd.grad((out, lse), inputs, (grad_out, grad_lse))
    q, k, v, *mask_arguments = flat(fastok.attention, *case.qkv, **case.mask)
    wanted = torch.ops.fastok.attention_backward(
        grad_out, grad_lse, *(x.detach() for x in (q, k, v, out, lse)),
        *(x.detach() if isinstance(x, Tensor) else x for x in mask_arguments),
    )  # fmt: skip
    for part, expected in zip(got, wanted, strict=False):
        assert_same(part, expected)


def test_gradients_through_one_result_alone() -> None:
    case = sized(causal=True)
    inputs = [x.requires_grad_() for x in case.qkv]
    out, lse = fastok.attention(*case.qkv, **case.mask)
    by_lse = torch.autograd.grad(lse.sum(), inputs, retain_graph=True)
    by_out = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    by_both = torch.autograd.grad(lse.sum() + out.sum(), inputs)
    assert (by_lse[2] == 0).all()  # the log-sum-exp does not depend on the values
    for first, second, both in zip(by_lse, by_out, by_both, strict=True):
        torch.testing.assert_close(first + second, both)


def test_only_what_needs_a_gradient_gets_one() -> None:
    case = sized(key_bias=torch.randn(2, 29))
    case.v.requires_grad_()
    out, lse, _ = fastok.attention_with_scores(*case.qkv, scores=(ScoreSpec(value_norm="l2"),), **case.mask)
    (out.sum() + lse.sum()).backward()
    assert case.v.grad is not None
    assert case.q.grad is None
    assert case.mask["key_bias"].grad is None


def test_expanded_heads_share_their_gradient() -> None:
    case = sized(heads=4, groups=1, causal=True)
    wide = [x.expand(-1, -1, 4, -1) for x in (case.k.requires_grad_(), case.v.requires_grad_())]
    grad = torch.randn(2, 17, 4, 32)
    shared = torch.autograd.grad(fastok.attention(*case.qkv, causal=True)[0], [case.k, case.v], grad)
    expanded = torch.autograd.grad(fastok.attention(case.q, *wide, causal=True)[0], [case.k, case.v], grad)
    for part, expected in zip(expanded, shared, strict=True):
        torch.testing.assert_close(part, expected)


@pytest.mark.parametrize("mask", ["bias-hidden", "causal-S>T", "packed-causal-behind"])
def test_rows_that_see_nothing_have_no_gradient(mask: str) -> None:
    case = MASKS[mask]()
    inputs = [x.requires_grad_() for x in case.qkv]
    out, lse = fastok.attention(*case.qkv, **case.mask)
    grads = torch.autograd.grad((out, lse), inputs, (torch.ones_like(out), torch.ones_like(lse)))
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert (grads[0][lse.transpose(-1, -2) == -math.inf] == 0).all()


@over_backends("attention_backward", without=("reference", *ONCE, *SLOW))
def test_repeatable_and_batch_invariant(backend: Backend) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        arguments = backward_arguments(sized(batch=3, s=140, t=150, causal=True).to(dtype))
        first = backend.attention_backward(*arguments)
        for part, expected in zip(backend.attention_backward(*arguments), first, strict=True):
            assert_same(part, expected)
        alone = [x[1:2] if isinstance(x, Tensor) else x for x in arguments]
        for part, expected in zip(backend.attention_backward(*alone)[:3], first, strict=False):
            assert_same(part, expected[1:2])
