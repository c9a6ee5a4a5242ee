"""Gradients of attention: the flat op on every backend, and autograd against a dense formula in fp64."""

import math
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
)
from attention_cases import one_thread as one_thread
from fastok import ScoreSpec
from fastok.reference.attention import attention as specification
from fastok.reference.attention import attention_backward as gradient_specification
from fastok.testing import Backend, assert_accurate, assert_same, over_backends
from fastok.testing.examples import verify
from fastok.testing.examples.attention import hidden_bias, odd_heads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
over_backward = over_backends("attention_backward", without=("reference",))
over_quick = over_backends("attention_backward", without=("reference", "cuda", *SLOW))


def backward_arguments(case: Case, with_lse: bool = True) -> tuple[Any, ...]:
    """The flat arguments of ``attention_backward`` for random gradients."""
    q, k, v, *mask = flat(fastok.attention, *case.qkv, **case.mask)
    out, lse = torch.ops.fastok.attention(q, k, v, *mask)
    return torch.randn(out.shape).to(q.dtype), torch.randn(lse.shape) if with_lse else None, q, k, v, out, lse, *mask


def check(backend: Backend, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The gradients on ``backend``, compared with the specification in fp64."""
    try:
        result: tuple[Tensor, ...] = backend.attention_backward(*arguments)
    except AttributeError:
        pytest.skip(f"{backend.name} has no attention_backward")
    verify("attention_backward", arguments, result)
    return result


@over_dtypes
@over_masks
@over_backward
def test_masks(backend: Backend, mask: str, dtype: torch.dtype) -> None:
    some_masks(backend, mask)
    for with_lse in (False, True):
        check(backend, backward_arguments(MASKS[mask]().to(dtype), with_lse))


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
    got = gradient_specification(grad_out, grad_lse, *own, *finished, *rest)
    for part, expected in zip(got, wanted, strict=False):
        torch.testing.assert_close(part, expected)


@pytest.mark.parametrize("mask", ["bias-heads", "softcap-bias-window", "packed-bias", "mqa-two-widths"])
def test_specification_passes_gradcheck(mask: str) -> None:
    class Specification(torch.autograd.Function):
        """Attention in fp64 and its gradient, both as the specification has them."""

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            out, lse = specification(*inputs)
            ctx.save_for_backward(*inputs[:3], out, lse, inputs[7])
            ctx.rest = inputs[3:7], inputs[8:]
            return out, lse

        @staticmethod
        def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> Any:
            *results, bias = ctx.saved_tensors
            numbers, rest = ctx.rest
            grads = gradient_specification(grad_out, grad_lse, *results, *numbers, bias, *rest)
            return *grads[:3], *[None] * 4, None if bias is None else grads[3], *[None] * 4

    def seen(*inputs: Any) -> Any:
        out, lse = Specification.apply(*inputs)
        return out, lse.masked_fill(lse == -math.inf, 0)  # a difference of infinities is no number

    arguments = [*flat(fastok.attention, *MASKS[mask]().qkv, **MASKS[mask]().mask)]
    for place in (0, 1, 2, 7):
        if arguments[place] is not None:
            arguments[place] = arguments[place].double().requires_grad_(place != 7)
    assert torch.autograd.gradcheck(seen, arguments, fast_mode=True)


@over_dtypes
@pytest.mark.parametrize(
    ("s", "t", "heads", "groups", "width", "causal"),
    [(197, 197, 3, 3, 64, False), (230, 300, 4, 2, 128, True), (350, 350, 2, 1, 40, True)],
)
@over_quick
def test_errs_no_more_than_torch(
    backend: Backend, s: int, t: int, heads: int, groups: int, width: int, causal: bool, dtype: torch.dtype
) -> None:
    """Several blocks of rows and of keys; the peer is PyTorch's own attention and its gradient in the same dtype."""
    case = sized(1, s, t, heads, groups, width, causal=causal).to(dtype)
    arguments = backward_arguments(case, with_lse=False)
    exact = [x.double().requires_grad_() for x in case.qkv]
    truth = torch.autograd.grad(dense_attention(Case(*exact, case.mask))[0], exact, arguments[0].double())
    seen = torch.ones(s, t, dtype=torch.bool).tril(t - s) if causal else None
    leaves = [x.clone().requires_grad_() for x in case.qkv]
    out = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in leaves), attn_mask=seen, enable_gqa=heads != groups
    )
    peers = torch.autograd.grad(out.transpose(1, 2), leaves, arguments[0])
    result = backend.attention_backward(*arguments)
    for got, wanted, peer in zip(result[:3], truth, peers, strict=True):
        assert_accurate(got, wanted, peer)


@settings(max_examples=25)
@given(
    batch=st.integers(0, 2), s=st.integers(0, 60), t=st.integers(0, 60), groups=st.integers(1, 2),
    ratio=st.integers(1, 3), width=st.integers(1, 32), v_width=st.integers(1, 32), left=st.integers(-1, 50),
    right=st.integers(-1, 50), biased=st.sampled_from([None, "sample", "head"]), softcap=st.sampled_from([None, 2.0]),
    seed=st.integers(0, 1000), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
@over_quick
def test_any_shape(
    backend: Backend, batch, s, t, groups, ratio, width, v_width, left, right, biased, softcap, seed, dtype
) -> None:
    torch.manual_seed(seed)
    heads = groups * ratio
    case = sized(batch, s, t, heads, groups, 8 * width, 8 * v_width, window=(left, right), softcap=softcap)
    if biased:
        case.mask["key_bias"] = hidden_bias(*((batch, t) if biased == "sample" else (batch, heads, t)))
    check(backend, backward_arguments(case.to(dtype)))


@settings(max_examples=15)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=5),
    behind=st.integers(0, 3), causal=st.booleans(), seed=st.integers(0, 1000), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
@over_quick
def test_any_packing(backend: Backend, lengths, behind, causal, seed, dtype) -> None:
    torch.manual_seed(seed)
    lengths_q, lengths_k = zip(*lengths, strict=True)
    case = packed(lengths_q, lengths_k, behind, causal=causal, key_bias=torch.randn)
    check(backend, backward_arguments(case.to(dtype)))


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


@over_dtypes
@over_quick
def test_logits_of_plus_and_minus_200(backend: Backend, dtype: torch.dtype) -> None:
    case = sized(width=64, scale=1.0)
    case.q.sign_()
    case.k.copy_(case.q[:, :1, :1] * torch.linspace(-200 / 64, 200 / 64, 29)[None, :, None, None])
    check(backend, backward_arguments(case.to(dtype)))


@over_backward
def test_nan_stays_with_its_row_and_the_keys_it_sees(backend: Backend) -> None:
    case = sized(batch=1, s=20, t=40, width=64, causal=True)
    arguments = backward_arguments(case)
    wanted = check(backend, arguments)
    arguments[0][0, 7, 1] = math.nan  # of query head 1, KV head 0; key 27 is the last one that row 7 sees
    d_q, d_k, d_v, _ = backend.attention_backward(*arguments)
    for part, expected, hit in zip((d_q, d_k, d_v), wanted, ((7, 1), (slice(28), 0), (slice(28), 0)), strict=False):
        assert part[0, hit[0], hit[1]].isnan().all()
        others = torch.ones(part.shape, dtype=torch.bool)
        others[0, :, 0] = False
        others[0, :, hit[1]] = False
        assert_same(part[others], expected[others])


@over_dtypes
@over_quick
def test_views(backend: Backend, dtype: torch.dtype) -> None:
    arguments = backward_arguments(sized(s=19, t=35, heads=6, groups=2, width=40, causal=True).to(dtype))
    grad_out, grad_lse, q, k, v, out, lse, *mask = arguments
    wanted = backend.attention_backward(*arguments)
    odd = backend.attention_backward(
        odd_heads(grad_out), grad_lse.mT.contiguous().mT, *(odd_heads(x) for x in (q, k, v, out)),
        lse.mT.contiguous().mT, *mask,
    )  # fmt: skip
    ones = grad_out.new_ones(1).expand(grad_out.shape)
    expanded = backend.attention_backward(ones, grad_lse, q, k, v, out, lse, *mask)
    copied = backend.attention_backward(ones.contiguous(), grad_lse, q, k, v, out, lse, *mask)
    for part, expected in zip((*odd, *expanded), (*wanted, *copied), strict=True):
        assert_same(part, expected)


@pytest.mark.parametrize("heads", [1, 3])
def test_thread_count_does_not_change_results(heads: int) -> None:
    """With fewer heads than threads, keys and queries have a pass each, and these are cut into parts."""
    cases = [sized(1, 700, 450, heads, 1, causal=True, key_bias=torch.randn(1, 450)), MASKS["packed-bias"]()]
    for dtype in (torch.float32, torch.bfloat16):
        for case in cases:
            torch.set_num_threads(1)
            arguments = backward_arguments(case.to(dtype))
            wanted = torch.ops.fastok.attention_backward(*arguments)
            for threads in (2, 5):
                torch.set_num_threads(threads)  # and afterwards what it was: one_thread
                for part, expected in zip(torch.ops.fastok.attention_backward(*arguments), wanted, strict=True):
                    assert_same(part, expected)


@over_quick
def test_repeatable_and_batch_invariant(backend: Backend) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        arguments = backward_arguments(sized(batch=3, s=140, t=150, causal=True).to(dtype))
        first = backend.attention_backward(*arguments)
        for part, expected in zip(backend.attention_backward(*arguments), first, strict=True):
            assert_same(part, expected)
        alone = [x[1:2] if isinstance(x, Tensor) else x for x in arguments]
        for part, expected in zip(backend.attention_backward(*alone)[:3], first, strict=False):
            assert_same(part, expected[1:2])


def test_gradients_are_of_first_order() -> None:
    """A gradient of a gradient would be wrong, and is refused; where it is only kept possible, nothing changes."""
    q, k, v = (torch.randn(1, 5, 2, 32, requires_grad=True) for _ in range(3))
    out, lse = fastok.attention(q, k, v)
    (plain,) = torch.autograd.grad(out.sum() + lse.sum(), q, retain_graph=True)
    (grad,) = torch.autograd.grad(out.sum() + lse.sum(), q, create_graph=True)
    assert torch.equal(grad, plain)
    with pytest.raises(NotImplementedError, match="attention: required, a gradient of its gradient"):
        grad.square().sum().backward()
