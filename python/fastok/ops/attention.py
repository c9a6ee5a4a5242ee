"""``attention``, its scores, merging of partial results: checks, fake kernels, autograd; kernels in csrc/attention."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import scores as statistics
from .autograd import call, only_once
from .checks import (
    ACTIVATIONS,
    check_at_least,
    check_dtype,
    check_int,
    check_range,
    check_same_device,
    check_scale,
    check_shape,
    check_softcap,
    check_tensor,
    has_values,
)
from .scores import ScoreSpec

Window = tuple[int, int] | None
HEAD_DIMS = "a multiple of 8 from 8 to 256"


class Masking(NamedTuple):
    """The arguments that all attention ops end with."""

    scale: float
    left: int
    right: int
    softcap: float
    key_bias: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: Window = None,
    softcap: float | None = None,
    key_bias: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact attention and the log-sum-exp of every row.

    Args:
        q: ``[B,S,H,D]`` fp32, fp16 or bf16; any strides with a contiguous last dimension. Packed: ``[total_q,H,D]``.
        k, v: ``[B,T,G,D]`` in the dtype of ``q``, G dividing H; query head h attends to KV head h // (H/G).
            Packed: ``[total_k,G,D]``. D is a multiple of 8 up to 256; ``v`` may have another width than ``k``.
        scale: of the dot products; ``D ** -0.5`` by default.
        causal: query i sees keys up to i + T - S (bottom-right aligned, as FlashAttention since 2.1).
        window: ``(left, right)``: query i sees keys from i + T - S - left to i + T - S + right; -1 is unbounded.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        key_bias: fp32 ``[B,T]`` or ``[B,H,T]`` (packed: ``[total_k]``, ``[H,total_k]``), added to the logits of a
            key after the softcap; -inf hides it. Differentiable.
        cu_seqlens_q, cu_seqlens_k: int32 ``[sequences + 1]``, where packed sequences begin and end.
        max_seqlen_q, max_seqlen_k: lengths of the longest ones, if known: a hint, never read from the device.

    Returns:
        ``out`` like ``q`` (with the width of ``v``), and ``lse`` fp32, natural logarithm, ``[B,H,S]`` (packed
        ``[H,total_q]``). A row that sees nothing has output 0 and lse -inf.

    Raises:
        TypeError: a dtype that is not listed. ValueError: shapes, devices or numbers that do not fit.

    Differentiable in q, k, v and key_bias, through both results. The gradient computes the probabilities anew from lse,
    in memory O(S + T): by fastok's own kernels on CPUs and in the CUDA library, elsewhere by the specification in
    chunks of query rows. PyTorch's flash backward could take our out and lse, but is not used: it adds up the gradient
    of q by atomics, or, when told to be deterministic, in an order that depends on the batch.

    Deterministic and batch-invariant; no host synchronisation. Of packed sequences, the bits of one do not depend on
    the others as long as the hints are the same: sequences of up to 64 queries have other kernels than longer ones.

    On GPUs the kernels are fastok's own, see ``fastok info``; those for Hopper (sm_90a) serve fp16 and bf16 with more
    than 64 queries, head dims 40 to 64 and 104 to 128, ``scale`` > 0 and no softcap. torch's flash and cuDNN forwards
    are not used even where they mean the same: the former splits the keys by the size of the batch, so that a row's
    bits depend on it, and of the latter nothing is promised. :func:`attention_scores` takes their log-sum-exp.
    FlashAttention-2, Dao, ICLR 2024; FlashAttention-3, Shah et al., NeurIPS 2024.
    """
    check_tensor("v", v)
    masking = _masking(q, k, v, scale, causal, window, softcap, key_bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                       max_seqlen_k)  # fmt: skip
    out, lse = call(torch.ops.fastok.attention, q, k, v, *masking)
    return out, lse


def attention_scores(
    q: Tensor,
    k: Tensor,
    *,
    lse: Tensor | None = None,
    spec: ScoreSpec = ScoreSpec(),  # noqa: B008 - immutable
    v: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    window: Window = None,
    softcap: float | None = None,
    key_bias: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> Tensor:
    """What the queries attend to, as ``spec`` asks, in a second pass that never holds the S x T matrix.

    Args:
        lse: the rows' log-sum-exp from :func:`attention` or any other attention kernel with the same masking: fp32
            ``[B,H,S]``, packed ``[H,total_q]``. None: computed here, for the selected rows.
        spec: the statistic, see :class:`ScoreSpec`.
        v: the values, for ``value_norm`` only.

        The others are as for :func:`attention`.

    Returns:
        fp32 ``[B,T']``, ``[B,H,T']`` (``heads="none"``) or ``[B,G,T']`` (groups), with a rows axis before T' for
        ``reduce="none"``. Packed: without B, and T' is total_k.

    Deterministic (no atomics), batch-invariant, not differentiable.
    """
    masking = _masking(q, k, v, scale, causal, window, softcap, key_bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                       max_seqlen_k)  # fmt: skip
    _check_spec("spec", spec)
    return _scores(q, k, v, lse, spec, masking)


def attention_with_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scores: tuple[ScoreSpec, ...] = (ScoreSpec(),),
    scale: float | None = None,
    causal: bool = False,
    window: Window = None,
    softcap: float | None = None,
    key_bias: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """:func:`attention` and, with its log-sum-exp, the statistics that ``scores`` asks for.

    Returns ``(out, lse, tensors)``, one tensor per spec as :func:`attention_scores` gives it. ``out`` and ``lse`` are
    differentiable, the scores are not. Memory O(S + T) per head unless ``reduce="none"`` asks for rows. On the CPU,
    sums of probabilities over all keys and a range of rows cost least as the first of ``scores``: the threads make them
    from the keys that they have just attended to. The numbers are the same.
    """
    check_tensor("v", v)
    masking = _masking(q, k, v, scale, causal, window, softcap, key_bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                       max_seqlen_k)  # fmt: skip
    if not isinstance(scores, (tuple, list)):
        raise TypeError(f"scores must be a tuple of fastok.ScoreSpec, got {type(scores).__name__} {scores!r}")
    for spec in scores:
        _check_spec("scores", spec)
    if not scores:
        return *call(torch.ops.fastok.attention, q, k, v, *masking), ()
    spec = scores[0]
    weight, which = _statistic(q, k, v, spec, masking)
    op = torch.ops.fastok.attention_with_scores
    out, lse, raw = call(op, q, k, v, weight, *masking, *which, spec.heads, spec.logits)
    first = _finished(q, k, spec, raw, masking)
    return out, lse, (first, *(_scores(q, k, v, lse, spec, masking) for spec in scores[1:]))


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys, from the results over each.

    Args:
        out_a, out_b: ``[B,S,H,D]`` (or ``[total,H,D]``), one dtype.
        lse_a, lse_b: fp32 ``[B,H,S]`` (or ``[H,total]``), natural logarithm.

    Returns ``(out, lse)`` of the same shapes; where both are -inf, output 0 and lse -inf. Commutative up to rounding,
    deterministic, differentiable where PyTorch's arithmetic is (it is plain PyTorch).
    """
    check_dtype("out_a", out_a, ACTIVATIONS)
    if out_a.dim() not in (3, 4):
        raise ValueError(f"out_a must be [B,S,H,D] or packed [total,H,D], got {list(out_a.shape)}")
    check_dtype("out_b", out_b, (out_a.dtype,))
    check_shape("out_b", out_b, tuple(out_a.shape), "that of out_a")
    check_same_device("out_b", out_b, "out_a", out_a.device)
    rows = out_a.shape[:-1]
    wanted = (rows[0], rows[2], rows[1]) if len(rows) == 3 else (rows[1], rows[0])
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        check_dtype(name, lse, (torch.float32,))
        check_shape(name, lse, wanted, "[B,H,S] of out_a")
        check_same_device(name, lse, "out_a", out_a.device)
    out, lse = torch.ops.fastok.merge_states(out_a, lse_a, out_b, lse_b)
    return out, lse


def _check_spec(name: str, spec: object) -> None:
    if not isinstance(spec, ScoreSpec):
        raise TypeError(f"{name} must be of fastok.ScoreSpec, got {type(spec).__name__} {spec!r}")


def _scores(q: Tensor, k: Tensor, v: Tensor | None, lse: Tensor | None, spec: ScoreSpec, masking: Masking) -> Tensor:
    heads, n_q = q.shape[-2], q.shape[-3]
    if lse is not None:
        check_dtype("lse", lse, (torch.float32,))
        check_shape("lse", lse, (heads, n_q) if q.dim() == 3 else (q.shape[0], heads, n_q), "[B,H,S] of q")
        check_same_device("lse", lse, "q", q.device)
        lse = lse.detach()
    weight, which = _statistic(q, k, v, spec, masking)
    masking = masking._replace(key_bias=None if masking.key_bias is None else masking.key_bias.detach())
    group = spec.head_group(heads, k.shape[-2])
    raw = torch.ops.fastok.attention_scores(
        q.detach(), k.detach(), lse, weight, *masking, *which, group, spec.heads == "max", spec.logits
    )
    raw = statistics.over_heads(spec.heads, raw, group, spec.reduce == "none")
    return _finished(q, k, spec, raw, masking)


def _statistic(
    q: Tensor, k: Tensor, v: Tensor | None, spec: ScoreSpec, masking: Masking
) -> tuple[Tensor | None, tuple[Any, ...]]:
    """The weights of keys and, ``rows`` to ``reduce``, arguments of the ops that make scores."""
    packed = masking.cu_seqlens_q is not None
    n_q, n_k = q.shape[-3], k.shape[-3]
    weight = None
    if spec.value_norm is not None:
        if v is None:
            raise ValueError(f"v must be given for value_norm={spec.value_norm!r}, got None")
        norm = torch.linalg.vector_norm(v.detach().float(), statistics.VALUE_NORMS[spec.value_norm], dim=-1)
        weight = norm.transpose(-1, -2).contiguous()
    rows = None
    row_begin = row_end = 0
    if isinstance(spec.rows, Tensor):
        rows = spec.rows
        check_same_device("rows", rows, "q", q.device)
        check_range("rows", rows, 0, n_q)
    elif packed:
        row_begin, row_end = statistics.unresolved(spec.row_slice())
        if spec.reduce == "none" and _places(row_begin, row_end) >= statistics.END // 2:
            raise ValueError(
                "rows must be a known number for reduce='none' and packed sequences; got " + repr(spec.rows)
            )
    else:
        if isinstance(spec.rows, int) and not -n_q <= spec.rows < n_q:
            raise ValueError(f"rows must be within [-{n_q}, {n_q}), got {spec.rows}")
        row_begin, row_end = statistics.resolve(spec.row_slice(), n_q)
    if packed and spec.cols is not None:
        raise NotImplementedError("cols of packed sequences: required, one slice of all; supported, cols=None")
    col_begin, col_end = statistics.resolve(spec.cols or (0, None), n_k)
    reduce = "sum" if spec.reduce == "mean" else spec.reduce
    return weight, (rows, row_begin, row_end, col_begin, col_end, spec.normalize == "cols", reduce)


def _finished(q: Tensor, k: Tensor, spec: ScoreSpec, raw: Tensor, masking: Masking) -> Tensor:
    """The statistic, of columns that are reduced over rows and heads."""
    if not spec.by_position():
        return raw
    n_q, n_k = q.shape[-3], k.shape[-3]
    sequences = statistics.sequences_of(n_q, n_k, masking.cu_seqlens_q, masking.cu_seqlens_k, q.device)
    cols = slice(*statistics.resolve(spec.cols or (0, None), n_k))
    return statistics.finish(spec, raw, sequences, cols, masking.left, masking.right)


def _places(begin: int, end: int) -> int:
    """The most rows that ``[begin:end]`` takes of any sequence; END if there is no knowing."""
    if (begin < 0) == (end < 0):
        return max(end - begin, 0)
    return -begin if begin < 0 else statistics.END


def _masking(
    q: Tensor, k: Tensor, v: Tensor | None, scale: float | None, causal: bool, window: Window, softcap: float | None,
    key_bias: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> Masking:  # fmt: skip
    """All checks of one call, and its arguments as the ops take them."""
    _check_tensors(q, k, v)
    batch, heads, n_k = q.shape[0], q.shape[-2], k.shape[-3]
    packed = cu_seqlens_q is not None
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        raise ValueError("cu_seqlens_q and cu_seqlens_k must be given together")
    if (q.dim() == 3) != packed:
        wanted = "[total,H,D] with cu_seqlens, [B,S,H,D] without"
        raise ValueError(f"q must be {wanted}; got {list(q.shape)} {'with' if packed else 'without'}")
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            check_dtype(name, cu, (torch.int32,))
            check_same_device(name, cu, "q", q.device)
        check_shape("cu_seqlens_q", cu_seqlens_q, (None,), "[sequences + 1]")
        if cu_seqlens_q.shape[0] == 0:
            raise ValueError("cu_seqlens_q must be [sequences + 1], got [0]")
        check_shape("cu_seqlens_k", cu_seqlens_k, (cu_seqlens_q.shape[0],), "that of cu_seqlens_q")
        check_ascending("cu_seqlens_q", cu_seqlens_q, q.shape[0])
        check_ascending("cu_seqlens_k", cu_seqlens_k, n_k)
    if window is not None and (not isinstance(window, (tuple, list)) or len(window) != 2):
        raise TypeError(f"window must be None or (left, right), got {window!r}")
    left, right = (-1, -1) if window is None else window
    for name, bound in (("window left", left), ("window right", right)):
        check_int(name, bound)
        if bound < -1:
            raise ValueError(f"{name} must be >= 0, or -1 for unbounded; got {bound}")
    for name, length in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if length is not None:
            check_at_least(name, length, 0)
    scale = check_scale(scale, q.shape[-1])
    if key_bias is not None:
        check_dtype("key_bias", key_bias, (torch.float32,))
        check_same_device("key_bias", key_bias, "q", q.device)
        shapes = ((n_k,), (heads, n_k)) if packed else ((batch, n_k), (batch, heads, n_k))
        check_shape("key_bias", key_bias, shapes[int(key_bias.dim() == len(shapes[1]))], "[B,T] or [B,H,T]")
    return Masking(
        scale, left, 0 if causal else right, check_softcap(softcap), key_bias, cu_seqlens_q, cu_seqlens_k,
        -1 if max_seqlen_q is None else max_seqlen_q, -1 if max_seqlen_k is None else max_seqlen_k,
    )  # fmt: skip


def check_ascending(name: str, cu_seqlens: Tensor, total: int) -> None:
    """ValueError unless values ascend within [0, total]. Only the CPU looks at them: elsewhere that would be a wait."""
    if cu_seqlens.device.type != "cpu" or not has_values(cu_seqlens):
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] < 0 or bounds[-1] > total or bounds != sorted(bounds):
        raise ValueError(f"{name} must ascend within [0, {total}], got {bounds}")


def _check_tensors(q: Tensor, k: Tensor, v: Tensor | None) -> None:
    check_dtype("q", q, ACTIVATIONS)
    check_dtype("k", k, (q.dtype,))
    if q.dim() not in (3, 4):
        raise ValueError(f"q must be [B,S,H,D] or packed [total,H,D], got {list(q.shape)}")
    lead = (q.shape[0],) if q.dim() == 4 else ()
    check_shape("k", k, (*lead, None, None, q.shape[-1]), "[B,T,G,D] to go with q")
    check_same_device("k", k, "q", q.device)
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2] != 0:
        raise ValueError(f"k must have a number of heads that divides those of q, {q.shape[-2]}; got {k.shape[-2]}")
    if v is not None:
        check_dtype("v", v, (q.dtype,))
        check_shape("v", v, (*lead, k.shape[-3], k.shape[-2], None), "[B,T,G,*] to go with k")
        check_same_device("v", v, "q", q.device)
    for name, x in (("q", q), ("v", v)):
        if x is not None and (x.shape[-1] % 8 != 0 or not 8 <= x.shape[-1] <= 256):
            raise ValueError(f"{name} must have a head dim that is {HEAD_DIMS}; got {x.shape[-1]}")


# ---- fake kernels and autograd ---------------------------------------------------------------------------------------


@torch.library.register_fake("fastok::attention")
def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    heads_first = (q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else (q.shape[1], q.shape[0])
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(heads_first, dtype=torch.float32)


@torch.library.register_fake("fastok::attention_backward")
def _attention_backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    scale: float, left: int, right: int, softcap: float, key_bias: Tensor | None, *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    bias_shape = (0,) if key_bias is None else key_bias.shape
    grad_bias = q.new_empty(bias_shape, dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_bias


@torch.library.register_fake("fastok::attention_scores")
def _attention_scores_fake(
    q: Tensor, k: Tensor, lse: Tensor | None, key_weight: Tensor | None, scale: float, left: int, right: int,
    softcap: float, key_bias: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    max_seqlen_q: int, max_seqlen_k: int, rows: Tensor | None, row_begin: int, row_end: int, col_begin: int,
    col_end: int, over_cols: bool, reduce: str, head_group: int, head_max: bool, logits: bool,
) -> Tensor:  # fmt: skip
    lead = () if cu_seqlens_q is not None else (q.shape[0],)
    n_rows = rows.shape[0] if rows is not None else row_end - row_begin
    if rows is None and cu_seqlens_q is not None:
        n_rows = _places(row_begin, row_end)
    middle = (n_rows,) if reduce == "none" else ()
    return q.new_empty(*lead, q.shape[-2] // head_group, *middle, col_end - col_begin, dtype=torch.float32)


@torch.library.register_fake("fastok::attention_with_scores")
def _attention_with_scores_fake(
    q: Tensor, k: Tensor, v: Tensor, key_weight: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *same, heads, logits = rest
    group = statistics.head_group(heads, q.shape[-2], k.shape[-2])
    raw = _attention_scores_fake(q, k, None, key_weight, *same, group, heads == "max", logits)
    keeps_rows = same[-1] == "none"
    if heads in ("mean", "sum", "max"):
        raw = raw.new_empty(raw.squeeze(-3 if keeps_rows else -2).shape)
    return *_attention_fake(q, k, v), raw


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, scale, left, right, softcap, key_bias, cu_q, cu_k, max_q, max_k = inputs
    ctx.save_for_backward(q, k, v, *output, key_bias, cu_q, cu_k)
    ctx.numbers = scale, left, right, softcap, max_q, max_k


def _attention_autograd(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, key_bias, cu_q, cu_k = ctx.saved_tensors
    scale, left, right, softcap, max_q, max_k = ctx.numbers
    grads = call(
        torch.ops.fastok.attention_backward,
        grad_out,
        grad_lse,
        q,
        k,
        v,
        out,
        lse,
        scale,
        left,
        right,
        softcap,
        key_bias,
        cu_q,
        cu_k,
        max_q,
        max_k,
    )
    return (*grads[:3], None, None, None, None, None if key_bias is None else grads[3], None, None, None, None)


only_once("fastok::attention_backward")
torch.library.register_autograd("fastok::attention", _attention_autograd, setup_context=_attention_setup)


def _with_scores_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, _, *rest = inputs
    _attention_setup(ctx, (q, k, v, *rest[:9]), output[:2])
    ctx.mark_non_differentiable(output[2])


def _with_scores_autograd(
    ctx: Any, grad_out: Tensor, grad_lse: Tensor, grad_scores: Tensor | None
) -> tuple[Tensor | None, ...]:
    grad_q, grad_k, grad_v, *of_masking = _attention_autograd(ctx, grad_out, grad_lse)
    return grad_q, grad_k, grad_v, None, *of_masking, *[None] * 9


torch.library.register_autograd(
    "fastok::attention_with_scores", _with_scores_autograd, setup_context=_with_scores_setup
)
