"""Examples of attention, its gradient and its scores, and how far rounding may move their results."""

import math
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ...ops.scores import head_group, over_heads
from ...reference.attention import (
    Problem,
    _grouped,
    _heads_first,
    _heads_last,
    _probabilities,
    _weighted,
    problem_of,
)
from ...reference.attention import attention as specification
from ...reference.attention import attention_scores as score_specification
from .registry import Arguments, example

EPS = torch.finfo(torch.float32).eps  # scores, log-sum-exp and all sums are in fp32


def heads(*shape: int) -> Tensor:
    """``[B,S,H,D]`` of a ``[B,H,S,D]`` tensor, as Hugging Face models have it: ``shape`` is of the latter."""
    return torch.randn(shape).transpose(1, 2)


def odd_heads(x: Tensor) -> Tensor:
    """The values of ``x[…,S,H,D]`` in the middle of NaN, at an odd offset and with odd strides."""
    *lead, n, count, width = x.shape
    room = torch.full((*lead, n + 1, count + 1, width + 5), math.nan, dtype=x.dtype)
    room[..., 1:, 1:, 3 : width + 3] = x
    return room[..., 1:, 1:, 3 : width + 3]


def masking(
    width: int, left: int = -1, right: int = -1, softcap: float = 0.0, key_bias: Tensor | None = None,
    cu_q: Tensor | None = None, cu_k: Tensor | None = None,
) -> Arguments:  # fmt: skip
    """The arguments that all attention ops have in common."""
    return width**-0.5, left, right, softcap, key_bias, cu_q, cu_k, -1, -1


def hidden_bias(*shape: int) -> Tensor:
    """A bias that hides a third of the keys."""
    return torch.where(torch.rand(shape) < 0.33, -math.inf, torch.randn(shape))


def cu(*lengths: int) -> Tensor:
    """``cu_seqlens`` of sequences of these lengths."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


# ---- what rounding may change ----------------------------------------------------------------------------------------


def _dense(q: Tensor, k: Tensor, *mask: Any) -> tuple[Problem, Tensor, Tensor]:
    """In fp64 all of a problem's logits, and by what order of magnitude a rounding moves a logit."""
    problem = problem_of(q.double(), k.double(), *mask[:-2])
    rows = torch.arange(problem.q.shape[2])
    scale, left, right, _, *rest = mask[:-2]
    magnitudes = abs(scale), left, right, 0.0, *rest
    size = problem_of(q.double().abs(), k.double().abs(), *magnitudes)
    terms = size.raw_logits(rows)
    if problem.key_bias is not None:
        terms = terms + problem.key_bias.abs().nan_to_num(posinf=0)
    logits = problem.logits(rows)
    return problem, logits, EPS * terms.masked_fill(logits == -math.inf, 0)


def _quadratic(weights: Tensor, values: Tensor) -> Tensor:
    """How much ``weights @ values`` moves when each product moves by its own random rounding."""
    return _weighted(weights.square(), values.square()).sqrt()


def rounding_of_attention(q: Tensor, k: Tensor, v: Tensor, *mask: Any) -> tuple[Tensor, ...]:
    """Of ``out`` one rounding of each probability to the dtype and of each logit to fp32; of ``lse`` the latter."""
    _, logits, moves = _dense(q, k, *mask)
    most = moves.amax(-1) if k.shape[-3] else moves.sum(-1)
    p = _probabilities(logits, logits.logsumexp(-1))
    values = _heads_first(v.double())
    out = _quadratic(p * (torch.finfo(q.dtype).eps + moves), values)
    out += most[..., None] * _weighted(p, values).abs()
    lse = EPS + most
    return _heads_last(out, q.dim()), lse if q.dim() == 4 else lse[0]


def rounding_of_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *mask: Any
) -> tuple[Tensor, ...]:
    """One rounding to the dtype of each probability and of its gradient, and of what these are made of to fp32."""
    problem, logits, moves = _dense(q, k, *mask)
    values, d_out, o = (_heads_first(x.double()) for x in (v, grad_out, out))
    groups, eps = problem.k.shape[1], torch.finfo(q.dtype).eps
    p = _probabilities(logits, (lse if lse.dim() == 3 else lse[None]).double())
    product = (_grouped(d_out, groups) @ values.mT).reshape(p.shape)
    product_terms = (_grouped(d_out.abs(), groups) @ values.mT.abs()).reshape(p.shape)
    delta, delta_terms = (d_out * o).sum(-1), (d_out * o).abs().sum(-1)
    if grad_lse is not None:
        d_lse = (grad_lse if grad_lse.dim() == 3 else grad_lse[None]).double()
        delta, delta_terms = delta - d_lse, delta_terms + d_lse.abs()
    d_logits = p * (product - delta[..., None])
    d_moves = (eps + EPS + moves) * d_logits.abs() + EPS * p * (product_terms + delta_terms[..., None])
    p_moves = p * (eps + EPS + moves)
    d_q = abs(mask[0]) * _quadratic(d_moves, problem.k)
    squares = _grouped(d_moves.square(), groups).mT @ _grouped(problem.q.square(), groups)
    d_v = (_grouped(p_moves.square(), groups).mT @ _grouped(d_out.square(), groups)).sqrt()
    none = torch.zeros(0)
    bias = mask[4]
    if bias is not None and problem.key_bias is not None:
        shape = problem.key_bias.shape
        none = d_moves.square().sum(2, keepdim=True).sum_to_size(shape).sqrt().reshape(bias.shape)
    d_q, d_k, d_v = (_heads_last(x, q.dim()) for x in (d_q, abs(mask[0]) * squares.sqrt(), d_v))
    return d_q, d_k, d_v, none


def rounding_of_scores(
    q: Tensor, k: Tensor, lse: Tensor | None, key_weight: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    """One rounding of each logit to fp32, and what follows from it."""
    mask, (rows, begin, end, _, _, _, reduce, group, head_max, logits) = rest[:9], rest[9:]
    moves = _dense(q, k, *mask)[2]
    most = float(moves.max()) if moves.numel() else 0.0
    if not logits:
        finished = None if lse is None else lse.double()
        return ((EPS + most) * score_specification(q.double(), k.double(), finished, key_weight, *rest).abs(),)
    if key_weight is not None and key_weight.numel():
        most *= float(key_weight.abs().max())
    if not head_max:
        most *= group
    if reduce == "sum":
        of_slice = q.shape[-3] if mask[5] is not None else max(end - begin, 0)
        most *= of_slice if rows is None else len(rows)
    return (torch.tensor(most),)


def rounding_of_both(q: Tensor, k: Tensor, v: Tensor, key_weight: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    """Of attention, and of its scores."""
    *same, which, logits = rest
    group = head_group(which, q.shape[-2], k.shape[-2])
    (scores,) = rounding_of_scores(q, k, None, key_weight, *same, group, which == "max", logits)
    if scores.dim():
        scores = over_heads(which, scores, group, same[-1] == "none")
    return *rounding_of_attention(q, k, v, *same[:9]), scores


# ---- attention: q, k, v, scale, left, right, softcap, key_bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k


def _causal(dtype: torch.dtype) -> Arguments:
    q, k, v = (torch.randn(2, n, h, 32).to(dtype) for n, h in ((17, 4), (23, 2), (23, 2)))
    return q, k, v, *masking(32, right=0, key_bias=torch.randn(2, 23))


def _views(dtype: torch.dtype) -> Arguments:
    q, k, v = (odd_heads(torch.randn(2, n, h, d).to(dtype)) for n, h, d in ((67, 6, 72), (131, 3, 72), (131, 3, 40)))
    return q, k, v, *masking(72, softcap=2.0, key_bias=hidden_bias(2, 6, 131))


def _window(dtype: torch.dtype) -> Arguments:
    q, k, v = (heads(1, h, n, 64).to(dtype) for n, h in ((150, 4), (97, 1), (97, 1)))
    return q, k, v, *masking(64, left=20, right=5)  # the first queries see nothing


def _packed(dtype: torch.dtype) -> Arguments:
    cu_q, cu_k = cu(5, 0, 70, 1, 33), cu(9, 12, 64, 0, 33)
    q, k, v = (torch.randn(n, h, 64).to(dtype) for n, h in ((112, 4), (120, 2), (120, 2)))  # and tokens behind
    return q, k, v, *masking(64, right=0, key_bias=torch.randn(120), cu_q=cu_q, cu_k=cu_k)


def _one_row(dtype: torch.dtype) -> Arguments:
    q, k, v = (torch.randn(1, n, h, 128).to(dtype) for n, h in ((1, 8), (1100, 2), (1100, 2)))
    return q, k, v, *masking(128, right=0)


def _tails(dtype: torch.dtype) -> Arguments:
    q, k, v = (heads(2, h, n, d).to(dtype) for h, n, d in ((4, 300, 128), (2, 197, 128), (2, 197, 112)))
    return q, k, v, *masking(128, right=0, key_bias=hidden_bias(2, 4, 197))


def _vit(dtype: torch.dtype) -> Arguments:
    q, k, v = (torch.randn(8, 577, 12, 64).to(dtype) for _ in range(3))
    return q, k, v, *masking(64)


def _prompt(dtype: torch.dtype) -> Arguments:
    q, k, v = (torch.randn(1, 2048, h, 128).to(dtype) for h in (16, 4, 4))
    return q, k, v, *masking(128, right=0)


AWKWARD = {
    "odd views, two widths, softcap, hidden keys": _views,
    "rows that see nothing, window, MQA, heads first": _window,
    "packed, empty sequences, tokens behind the last": _packed,
    "one row, many keys": _one_row,
    "tails of tiles, head dim 128, keys hidden by head": _tails,
}
LARGE = {"(8,577,12,64)": _vit, "(1,2048,16/4,128) causal": _prompt}
FLOPS = {"(8,577,12,64)": 4.0 * 8 * 12 * 577**2 * 64, "(1,2048,16/4,128) causal": 2.0 * 16 * 2048**2 * 128}

example("attention", "small", "causal, GQA, bias")(_causal)
for _title, _build in AWKWARD.items():
    example("attention", "awkward", _title)(_build)
for _title, _build in LARGE.items():
    example("attention", "large", _title, flops=FLOPS[_title])(_build)


# ---- attention_backward: grad_out, grad_lse, q, k, v, out, lse, scale, … as attention --------------------------------


def _of_attention(build: Any, with_lse: bool) -> Any:
    def backward(dtype: torch.dtype) -> Arguments:
        q, k, v, *mask = build(dtype)
        out, lse = specification(q, k, v, *mask)
        return torch.randn(out.shape).to(dtype), torch.randn(lse.shape) if with_lse else None, q, k, v, out, lse, *mask

    return backward


example("attention_backward", "small", "causal, GQA, bias")(_of_attention(_causal, False))
for _title, _build in AWKWARD.items():
    example("attention_backward", "awkward", _title)(_of_attention(_build, True))
for _title, _build in LARGE.items():
    example("attention_backward", "large", _title, flops=2.5 * FLOPS[_title])(_of_attention(_build, False))


# ---- attention_scores: q, k, lse, key_weight, scale, … max_seqlen_k, rows, row_begin, row_end, col_begin, col_end,
# over_cols, reduce, head_group, head_max, logits ----------------------------------------------------------------------

LAST = 2**31 - 1


def _scores(build: Any, *which: Any, weigh: bool = False, own_lse: bool = False) -> Any:
    def scores(dtype: torch.dtype) -> Arguments:
        q, k, v, *mask = build(dtype)
        lse = None if own_lse else specification(q, k, v, *mask)[1]
        weight = torch.rand(*k.shape[:-3], k.shape[-2], k.shape[-3]) if weigh else None
        return q, k, lse, weight, *mask, *which

    return scores


def _listed(dtype: torch.dtype) -> Arguments:
    arguments = _scores(_views, None, 0, 0, 11, 120, False, "none", 2, False, False, weigh=True)(dtype)
    return *arguments[:13], torch.tensor([5, 66, 5, 0, 31]), *arguments[14:]


example("attention_scores", "small", "sum over all rows and heads")(
    _scores(_causal, None, 0, 17, 0, 23, False, "sum", 4, False, False)
)
example("attention_scores", "awkward", "listed rows, a slice of odd keys, weights, group sums")(_listed)
example("attention_scores", "awkward", "maximum of logits over rows and heads, lse not given")(
    _scores(_window, None, 0, 150, 0, 97, False, "max", 4, True, True, own_lse=True)
)
example("attention_scores", "awkward", "softmax over a slice of keys")(
    _scores(_window, None, 30, 150, 10, 50, True, "sum", 1, False, False, own_lse=True)
)
example("attention_scores", "awkward", "last rows of packed sequences, each head")(
    _scores(_packed, None, -3, LAST, 0, 120, False, "none", 1, False, False)
)
example("attention_scores", "awkward", "sums over all rows of packed sequences")(
    _scores(_packed, None, 0, LAST, 0, 120, False, "sum", 2, False, False)
)
example("attention_scores", "awkward", "sums over most rows, tails of tiles, weights, lse not given")(
    _scores(_tails, None, 3, 290, 5, 197, False, "sum", 4, False, False, weigh=True, own_lse=True)
)
example("attention_scores", "awkward", "one row, many keys")(
    _scores(_one_row, None, 0, 1, 0, 1100, False, "sum", 8, False, False)
)
for _title, _build, _n in (("(8,577,12,64)", _vit, 577), ("(1,2048,16/4,128) causal", _prompt, 2048)):
    example("attention_scores", "large", _title, flops=FLOPS[_title] / 2)(
        _scores(_build, None, 0, _n, 0, _n, False, "sum", 1, False, False)
    )


# ---- attention_with_scores: q, k, v, key_weight, scale, … reduce, heads, logits --------------------------------------


def _both(build: Any, *which: Any, weigh: bool = False) -> Any:
    def both(dtype: torch.dtype) -> Arguments:
        q, k, v, *mask = build(dtype)
        weight = torch.rand(*k.shape[:-3], k.shape[-2], k.shape[-3]) if weigh else None
        return q, k, v, weight, *mask, *which

    return both


example("attention_with_scores", "small", "sum over all rows and heads")(
    _both(_causal, None, 0, 17, 0, 23, False, "sum", "mean", False)
)
example("attention_with_scores", "awkward", "the last of many rows, each head, logits")(
    _both(_window, None, 149, 150, 0, 97, False, "max", "none", True)
)
example("attention_with_scores", "awkward", "sums over some rows of several blocks, weights")(
    _both(_tails, None, 60, 290, 0, 197, False, "sum", "mean", False, weigh=True)
)
example("attention_with_scores", "awkward", "packed sequences")(
    _both(_packed, None, 0, LAST, 0, 120, False, "sum", "group_sum", False)
)
for _title, _build, _n in (("(8,577,12,64)", _vit, 577), ("(1,2048,16/4,128) causal", _prompt, 2048)):
    example("attention_with_scores", "large", _title, flops=1.5 * FLOPS[_title])(
        _both(_build, None, 0, _n, 0, _n, False, "sum", "mean", False)
    )
