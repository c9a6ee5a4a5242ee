"""Specification of attention, its gradient, and what is exported of the attention matrix. Rows of queries are taken in
chunks, so that memory grows with S + T, not with S x T (beyond what ``reduce="none"`` asks for)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.scores import head_group, over_heads

CHUNK = 256
INFINITY = float("inf")


@dataclass(frozen=True)
class Problem:
    """One call's queries and keys as ``[B,H,S,D]`` and ``[B,G,T,D]``, and who sees whom.

    Packed sequences are one batch entry in which only tokens of the same sequence see each other.
    """

    q: Tensor
    k: Tensor
    scale: float
    left: int
    right: int
    softcap: float
    key_bias: Tensor | None  # [B,1,1,T] or [B,H,1,T]
    q_sequence: Tensor | None  # [S], packed only: which sequence
    k_sequence: Tensor | None
    q_position: Tensor  # [S] where the query stands among its sequence's keys
    k_position: Tensor  # [T]

    def visible(self, rows: Tensor) -> Tensor:
        """Bool ``[R,T]``: which keys the query rows may see."""
        distance = self.k_position - self.q_position[rows, None]
        seen = torch.ones_like(distance, dtype=torch.bool)
        if self.left >= 0:
            seen &= distance >= -self.left
        if self.right >= 0:
            seen &= distance <= self.right
        if self.q_sequence is not None and self.k_sequence is not None:
            seen &= self.q_sequence[rows, None] == self.k_sequence
        return seen

    def raw_logits(self, rows: Tensor) -> Tensor:
        """scale * q k^T of the rows, ``[B,H,R,T]``."""
        batch, heads = self.q.shape[:2]
        q = _grouped(self.q[:, :, rows], self.k.shape[1])
        return (q @ self.k.mT).reshape(batch, heads, len(rows), self.k.shape[2]) * self.scale

    def finish_logits(self, raw: Tensor, rows: Tensor) -> Tensor:
        """Softcap, bias, mask."""
        logits = self.softcap * torch.tanh(raw / self.softcap) if self.softcap > 0 else raw
        if self.key_bias is not None:
            logits = logits + self.key_bias
        return logits.masked_fill(~self.visible(rows), -INFINITY)

    def logits(self, rows: Tensor) -> Tensor:
        """What the softmax is taken of, ``[B,H,R,T]``; -inf where the query does not see the key."""
        return self.finish_logits(self.raw_logits(rows), rows)

    def chunks(self) -> Iterator[Tensor]:
        """All query rows, ``CHUNK`` at a time."""
        return iter(torch.arange(self.q.shape[2], device=self.q.device).split(CHUNK))


def problem_of(
    q: Tensor, k: Tensor, scale: float, left: int, right: int, softcap: float, key_bias: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
) -> Problem:  # fmt: skip
    """From the arguments of the ops (``[B,S,H,D]`` or packed ``[total,H,D]``) to a :class:`Problem`."""
    q, k = _heads_first(q), _heads_first(k)
    n_q, n_k, device = q.shape[2], k.shape[2], q.device
    q_sequence = k_sequence = None
    q_position, k_position = torch.arange(n_q, device=device), torch.arange(n_k, device=device)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        q_position = q_position + (n_k - n_q)
    else:
        # Rows behind the last sequence belong to none; queries and keys there get different numbers.
        q_sequence = torch.searchsorted(cu_seqlens_q[1:], q_position, right=True)
        k_sequence = torch.searchsorted(cu_seqlens_k[1:], k_position, right=True)
        q_start, k_start = (torch.nn.functional.pad(cu, (0, 1)) for cu in (cu_seqlens_q, cu_seqlens_k))
        lengths = torch.nn.functional.pad(cu_seqlens_k.diff() - cu_seqlens_q.diff(), (0, 1))
        q_position = q_position - q_start[q_sequence] + lengths[q_sequence]
        k_position = k_position - k_start[k_sequence]
        k_sequence = torch.where(k_sequence == len(cu_seqlens_k) - 1, -1, k_sequence)
    if key_bias is not None:
        packed = cu_seqlens_q is not None
        per_head = key_bias.dim() == (2 if packed else 3)
        key_bias = key_bias.reshape(q.shape[0], q.shape[1] if per_head else 1, 1, n_k)
    return Problem(q, k, scale, left, right, softcap, key_bias, q_sequence, k_sequence, q_position, k_position)


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int, softcap: float, key_bias: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, max_seqlen_q: int, max_seqlen_k: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``torch.ops.fastok.attention``: ``out`` like ``q`` with the width of ``v``, and the log-sum-exp of each row."""
    problem = problem_of(_wide(q), _wide(k), scale, left, right, softcap, key_bias, cu_seqlens_q, cu_seqlens_k)
    values = _heads_first(_wide(v))
    batch, heads = problem.q.shape[:2]
    outs, lses = [problem.q.new_zeros(batch, heads, 0, values.shape[3])], [problem.q.new_zeros(batch, heads, 0)]
    for rows in problem.chunks():
        logits = problem.logits(rows)
        lse = logits.logsumexp(-1)
        outs.append(_weighted(_probabilities(logits, lse), values))
        lses.append(lse)
    out, lse = _heads_last(torch.cat(outs, 2), q.dim()), torch.cat(lses, 2)
    return out.to(q.dtype), lse if q.dim() == 4 else lse[0]


def attention_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
    left: int, right: int, softcap: float, key_bias: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, max_seqlen_q: int, max_seqlen_k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``torch.ops.fastok.attention_backward``: gradients of q, k, v and key_bias (empty without one).

    With P the probabilities and dP = dO V^T: dS = P * (dP - rowsum(dO * O) + dlse), through the softcap's derivative.
    """
    problem = problem_of(_wide(q), _wide(k), scale, left, right, softcap, key_bias, cu_seqlens_q, cu_seqlens_k)
    values, d_out, o = (_heads_first(_wide(x)) for x in (v, grad_out, out))
    groups = problem.k.shape[1]
    finished = (lse if lse.dim() == 3 else lse[None]).to(problem.q.dtype)
    d_lse = None if grad_lse is None else (grad_lse if grad_lse.dim() == 3 else grad_lse[None]).to(problem.q.dtype)
    d_q, d_k, d_v = torch.zeros_like(problem.q), torch.zeros_like(problem.k), torch.zeros_like(values)
    d_bias = None if problem.key_bias is None else torch.zeros_like(problem.key_bias)
    for rows in problem.chunks():
        raw = problem.raw_logits(rows)
        p = _probabilities(problem.finish_logits(raw, rows), finished[:, :, rows])
        d_o = d_out[:, :, rows]
        delta = (d_o * o[:, :, rows]).sum(-1)
        if d_lse is not None:
            # The log-sum-exp of a row that sees nothing is a constant.
            delta = delta - d_lse[:, :, rows].masked_fill(finished[:, :, rows] == -INFINITY, 0)
        d_logits = p * (_grouped(d_o, groups) @ values.mT).reshape(p.shape).sub(delta[..., None])
        d_v += _grouped(p, groups).mT @ _grouped(d_o, groups)
        if d_bias is not None:
            d_bias += d_logits.sum(2, keepdim=True).sum_to_size(d_bias.shape)
        if softcap > 0:
            d_logits = d_logits * (1 - torch.tanh(raw / softcap) ** 2)
        d_logits = _grouped(d_logits * scale, groups)
        d_q[:, :, rows] = (d_logits @ problem.k).reshape(d_q[:, :, rows].shape)
        d_k += d_logits.mT @ _grouped(problem.q[:, :, rows], groups)
    d_q, d_k, d_v = (_heads_last(x, q.dim()).to(like.dtype) for x, like in zip((d_q, d_k, d_v), (q, k, v), strict=True))
    none = q.new_zeros(0, dtype=torch.float32)
    return (
        d_q,
        d_k,
        d_v,
        none if key_bias is None or d_bias is None else d_bias.reshape(key_bias.shape).to(key_bias.dtype),
    )


def attention_scores(
    q: Tensor, k: Tensor, lse: Tensor | None, key_weight: Tensor | None, scale: float, left: int, right: int,
    softcap: float, key_bias: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    max_seqlen_q: int, max_seqlen_k: int, rows: Tensor | None, row_begin: int, row_end: int, col_begin: int,
    col_end: int, over_cols: bool, reduce: str, head_group: int, head_max: bool, logits: bool,
) -> Tensor:  # fmt: skip
    """``torch.ops.fastok.attention_scores``: column statistics of the attention matrix, fp32 ``[B, H/head_group, T']``.

    Args:
        lse: each row's log-sum-exp ``[B,H,S]`` (packed ``[H,total]``); None: to be computed.
        key_weight: ``[B,G,T]`` (packed ``[G,total_k]``), multiplies the scores of each KV head.
        rows: query indices ``[R]``, used for every sequence; None: the slice ``[row_begin:row_end]`` of each.
        col_begin, col_end: which keys. ``over_cols``: the softmax is over these only.
        reduce: over rows, ``"sum"``, ``"max"`` or ``"none"``, which keeps them: ``[B, H/head_group, R, T']``.
        head_group: so many neighbouring query heads are summed, or their maximum taken with ``head_max``, row by row.
        logits: scores before the softmax; -inf where a query does not see a key, which sums leave out.
    """
    problem = problem_of(_wide(q), _wide(k), scale, left, right, softcap, key_bias, cu_seqlens_q, cu_seqlens_k)
    batch, heads, n_q, _ = problem.q.shape
    cols = slice(col_begin, col_end)
    finished = None if lse is None or over_cols else (lse if lse.dim() == 3 else lse[None]).to(problem.q.dtype)
    weight = None
    if key_weight is not None:
        weight = (key_weight if key_weight.dim() == 3 else key_weight[None])[..., cols].to(problem.q.dtype)
        weight = weight.repeat_interleave(heads // weight.shape[1], 1)[:, :, None]

    def scores_of(row: Tensor, inside: Tensor) -> Tensor:
        """``[B, H/head_group, R, T']`` of these rows; as for rows that see nothing where not ``inside``."""
        full = problem.logits(row).masked_fill(~inside[:, None], -INFINITY)
        values = full[..., cols]
        if not logits:
            whole = finished[:, :, row] if finished is not None else (values if over_cols else full).logsumexp(-1)
            values = _probabilities(values, whole)
        if weight is not None:
            values = torch.where(values == -INFINITY, values, values * weight)
        values = values.unflatten(1, (heads // head_group, head_group))
        if head_max:
            return values.amax(2)
        return values.masked_fill(values == -INFINITY, 0).sum(2) if reduce == "sum" else values.sum(2)

    selection = _selection(problem, rows, row_begin, row_end, cu_seqlens_q, each_its_own=reduce == "none")
    n_cols = problem.k[:, :, cols].shape[2]
    shape = (batch, heads // head_group, n_cols)
    total = problem.q.new_full(shape, -INFINITY if reduce == "max" and logits else 0)
    kept = [total.new_zeros(*shape[:2], 0, n_cols)]
    for chunk in selection.split(CHUNK, dim=-1):
        if chunk.numel() == 0 or n_q == 0:
            kept.append(total.new_full((*shape[:2], chunk.shape[-1], n_cols), -INFINITY if logits else 0))
            continue
        values = torch.stack([scores_of(row.clamp(0, max(n_q - 1, 0)), row >= 0) for row in chunk.unbind(0)], 2)
        if reduce == "none":
            # A key belongs to one of the packed sequences: its row is the one that is not empty.
            kept.append(values.amax(2) if logits else values.sum(2))
        elif reduce == "max":
            total = torch.maximum(total, values.flatten(2, 3).amax(2))
        else:
            total = total + values.masked_fill(values == -INFINITY, 0).sum((2, 3))
    result = (torch.cat(kept, 2) if reduce == "none" else total).to(_score_dtype(q))
    return result if q.dim() == 4 else result[0]


def attention_with_scores(
    q: Tensor, k: Tensor, v: Tensor, key_weight: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.ops.fastok.attention_with_scores``: :func:`attention`, and with its lse :func:`attention_scores`.

    ``rest`` is what they take from ``scale`` to ``reduce``, then ``heads`` as of :class:`ScoreSpec`, and ``logits``.
    """
    return with_scores(attention, attention_scores, q, k, v, key_weight, *rest)


def with_scores(
    attend: Callable[..., Any], score: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, key_weight: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``attention_with_scores`` by the ops that it consists of."""
    *same, heads, logits = rest
    group = head_group(heads, q.shape[-2], k.shape[-2])
    out, lse = attend(q, k, v, *same[:9])
    raw = score(q, k, lse, key_weight, *same, group, heads == "max", logits)
    return out, lse, over_heads(heads, raw, group, same[-1] == "none")


def log_add(a: Tensor, b: Tensor) -> Tensor:
    """``torch.logaddexp``, whose last bit, on CPUs, would depend on the places of the numbers in their tensor."""
    high = torch.maximum(a, b)
    gap = torch.where(high.isinf(), 0, torch.minimum(a, b) - high)
    return high + gap.exp().log1p()


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.ops.fastok.merge_states``: attention over the union of two disjoint sets of keys."""
    lse = log_add(lse_a, lse_b)
    out = torch.zeros_like(_wide(out_a))
    for part, part_lse in ((out_a, lse_a), (out_b, lse_b)):
        weight = _probabilities(part_lse, lse, per_row=True).movedim(-2, -1)[..., None]
        out = out + torch.where(weight == 0, 0, _wide(part)) * weight
    return out.to(out_a.dtype), lse


def _selection(
    problem: Problem, rows: Tensor | None, begin: int, end: int, cu: Tensor | None, each_its_own: bool
) -> Tensor:
    """Query rows ``[1,R]``, or ``[sequences,R]`` of packed ones; -1 where a sequence has no such row."""
    every = torch.arange(problem.q.shape[2], device=problem.q.device)
    if cu is None:
        return (every[begin:end] if rows is None else rows)[None]
    lengths = cu.diff()[:, None]
    first = (lengths + begin).clamp(min=0) if begin < 0 else torch.full_like(lengths, begin)
    last = lengths + end if end < 0 else lengths.clamp(max=end)
    if rows is None and not each_its_own:
        # Order does not matter: one list of all rows, those not selected struck out.
        sequence = problem.q_sequence
        assert sequence is not None
        number = sequence.clamp(max=len(lengths) - 1)
        local = every - cu[number]
        chosen = (local >= first[number, 0]) & (local < last[number, 0]) & (sequence < len(lengths))
        return torch.where(chosen, every, -1)[None]
    if rows is None:
        local = first + torch.arange(slice_length(begin, end), device=every.device)
        inside = local < last
    else:
        local = rows.expand(len(lengths), -1)
        inside = local < lengths
    return torch.where(inside, local + cu[:-1, None], -1)


def slice_length(begin: int, end: int) -> int:
    """The most rows that ``[begin:end]`` can take of any sequence."""
    if (begin < 0) == (end < 0):
        return max(end - begin, 0)
    return -begin if begin < 0 else 2**31 - 1


def _score_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2) if x.dim() == 4 else x.transpose(0, 1)[None]


def _heads_last(x: Tensor, dims: int) -> Tensor:
    return (x.transpose(1, 2) if dims == 4 else x[0].transpose(0, 1)).contiguous()


def _grouped(x: Tensor, groups: int) -> Tensor:
    """The rows of all query heads of one KV head below each other."""
    batch, heads, rows, width = x.shape
    return x.reshape(batch, groups, heads // groups * rows, width)


def _weighted(p: Tensor, values: Tensor) -> Tensor:
    batch, heads, rows, _ = p.shape
    return (_grouped(p, values.shape[1]) @ values).reshape(batch, heads, rows, values.shape[3])


def _probabilities(logits: Tensor, lse: Tensor, per_row: bool = False) -> Tensor:
    """exp(logits - lse), 0 for rows that see nothing."""
    lse = lse if per_row else lse[..., None]
    return torch.where(lse == -INFINITY, 0, torch.exp(logits - lse))
