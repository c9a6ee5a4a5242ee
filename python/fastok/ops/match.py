"""``bipartite_match`` and ``nearest``: checks and fake kernels; the kernels are in csrc/match."""

import torch
from torch import Tensor

from ..token_map import TokenMap
from .checks import (
    ACTIVATIONS,
    check_dtype,
    check_int,
    check_number,
    check_range,
    check_same_device,
    check_shape,
    check_tensor,
    has_values,
)

Partition = str | tuple[Tensor, Tensor]
SIMILARITIES = ("cosine", "dot", "euclidean")


def bipartite_match(
    metric: Tensor,
    r: int,
    *,
    protect: int = 0,
    partition: Partition = "alternate",
    threshold: float | None = None,
    bias: Tensor | None = None,
    order: str = "tome",
) -> TokenMap:
    """Bipartite soft matching: the ``r`` sources most similar to some destination merge into it.

    Args:
        metric: ``[B,N,D]`` fp32, fp16 or bf16, what similarity is measured on (cosine, in fp32). Any strides; not
            copied if the last dimension is contiguous. No gradient flows through it.
        r: how many tokens to merge away, at least 0. Clamped to ``(N - protect) // 2`` for ``"alternate"``, to the
            unprotected sources for a pair, and per sample to the sources whose score is not NaN.
        protect: that many leading tokens are neither merged nor merged into (CLS, distillation, registers).
        partition: ``"alternate"`` (even positions are sources, odd ones destinations) or ``(src, dst)``, disjoint int64
            positions ``[Ns]``, ``[Nd]``, or ``[B,Ns]``, ``[B,Nd]`` per sample. Tokens in neither stay as they are.
        threshold: merge only sources whose score is greater. The map is then ragged: ``n_out`` is N and ``counts`` says
            how many slots each sample uses.
        bias: fp32 ``[B,N]``, added to a source's score for ranking only.
        order: how slots are numbered. ``"tome"``, as published: protected tokens (and those in neither set), then kept
            sources (ascending if ``protect >= 1``, else by descending ranking score), then destinations in the order
            given. ``"sorted"``: by lowest member. A sample in which nothing merges keeps its original order.

    Returns:
        A :class:`TokenMap` from N to N - r tokens (N with ``threshold``).

    Raises:
        TypeError: ``metric`` or ``bias`` of another dtype, ``r`` or ``protect`` not an int.
        ValueError: negative ``r``, ``protect`` outside [0, N], positions out of range or given twice (values are read,
            which on CUDA waits for the device; trusted under ``torch.compile``), shapes or devices that do not fit.

    Deterministic and batch-invariant; ties go to the lowest index; a zero vector has cosine 0 with everything. NaN
    scores sort last and never win. If NaN leaves a sample fewer than r mergeable sources, the CPU makes ``n_out`` the
    largest count (``counts`` is ragged); on CUDA and under ``torch.compile``, where the shape must be known before the
    data, the NaN sources merge into the first destination instead (and a pair with ``protect > 0`` gives a ragged map
    of capacity N). No host synchronisation with ``"alternate"``. Token Merging, Bolya et al., ICLR 2023.
    """
    check_dtype("metric", metric, ACTIVATIONS)
    if metric.dim() != 3:
        raise ValueError(f"metric must be [B,N,D], got shape {list(metric.shape)}")
    check_int("r", r)
    check_int("protect", protect)
    batch, n, _ = metric.shape
    if r < 0:
        raise ValueError(f"r must be >= 0, got {r}")
    if not 0 <= protect <= n:
        raise ValueError(f"protect must be within [0, N={n}], got {protect}")
    if threshold is not None:
        check_number("threshold", threshold)
    if order != "tome" and order != "sorted":
        raise ValueError(f"order must be 'tome' or 'sorted', got {order!r}")
    if bias is not None:
        check_dtype("bias", bias, (torch.float32,))
        check_shape("bias", bias, (batch, n), "[B,N] of metric")
        check_same_device("bias", bias, "metric", metric.device)
    static_shape = metric.is_cuda or torch.compiler.is_compiling()
    if isinstance(partition, str):
        if partition != "alternate":
            raise ValueError(f"partition must be 'alternate' or a pair (src, dst), got {partition!r}")
        src = dst = None
        limit = (n - protect) // 2
    else:
        src, dst = _checked_pair(partition, metric)
        limit = src.shape[-1] if dst.shape[-1] > 0 else 0
        if static_shape and protect > 0 and threshold is None:
            threshold = -float("inf")
    assign, counts, offsets, members = torch.ops.fastok.bipartite_match(
        metric, min(r, limit), protect, threshold, bias, src, dst, order == "sorted", static_shape
    )
    return TokenMap(assign, offsets.shape[1] - 1, counts, offsets, members)


def nearest(
    x: Tensor, y: Tensor, k: int = 1, *, similarity: str = "cosine", mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The ``k`` rows of ``y`` most similar to each row of ``x``, best first, without the N x M matrix in memory.

    Args:
        x: ``[B,N,D]`` fp32, fp16 or bf16. Any strides; not copied if the last dimension is contiguous.
        y: ``[B,M,D]``, candidates, in the dtype of ``x``.
        k: how many, from 1 to M.
        similarity: ``"cosine"``, ``"dot"``, or ``"euclidean"`` (negated squared distance).
        mask: bool ``[B,M]``, True for the candidates that may be chosen. None allows all.

    Returns:
        ``value`` fp32 ``[B,N,k]`` and ``index`` int64 ``[B,N,k]``. Masked candidates and NaN similarities never win;
        where fewer than k candidates remain, the rest is value -inf, index -1.

    Raises:
        TypeError: a dtype that is not listed, ``k`` not an int.
        ValueError: shapes or devices that do not fit, ``k`` outside [1, M], an unknown similarity.

    Computed in fp32; deterministic and batch-invariant; ties go to the lowest index. Not differentiable.
    """
    check_dtype("x", x, ACTIVATIONS)
    check_dtype("y", y, (x.dtype,))
    if x.dim() != 3:
        raise ValueError(f"x must be [B,N,D], got shape {list(x.shape)}")
    check_shape("y", y, (x.shape[0], None, x.shape[2]), "[B,M,D] to go with x")
    check_same_device("y", y, "x", x.device)
    check_int("k", k)
    if not 1 <= k <= y.shape[1]:
        raise ValueError(f"k must be within [1, M={y.shape[1]}], got {k}")
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity must be one of {', '.join(SIMILARITIES)}; got {similarity!r}")
    if mask is not None:
        check_dtype("mask", mask, (torch.bool,))
        check_shape("mask", mask, (x.shape[0], y.shape[1]), "[B,M] of y")
        check_same_device("mask", mask, "x", x.device)
    return torch.ops.fastok.nearest(x.detach(), y.detach(), k, similarity, mask)


def _checked_pair(partition: tuple[Tensor, Tensor], metric: Tensor) -> tuple[Tensor, Tensor]:
    """Source and destination positions as int64, in range, each position at most once."""
    if not isinstance(partition, tuple) or len(partition) != 2:
        raise TypeError(
            f"partition must be 'alternate' or a pair (src, dst) of tensors, got {type(partition).__name__}"
        )
    batch, n, _ = metric.shape
    for name, index in zip(("partition src", "partition dst"), partition, strict=True):
        check_tensor(name, index)
        if index.dim() == 1:
            check_shape(name, index, (None,), "[Ns] or [B,Ns]")
        else:
            check_shape(name, index, (batch, None), "[Ns] or [B,Ns]")
        check_same_device(name, index, "metric", metric.device)
        check_range(name, index, 0, n)
    src, dst = (index.long() for index in partition)
    if has_values(src) and has_values(dst):
        width = src.shape[-1] + dst.shape[-1]
        both = torch.cat([src.expand(batch, -1), dst.expand(batch, -1)], dim=1)
        ascending = both.sort(dim=1).values
        if width > 1 and bool((ascending[:, 1:] == ascending[:, :-1]).any()):
            raise ValueError("partition must name each position at most once, got a repeated position")
    return src, dst


@torch.library.register_fake("fastok::bipartite_match")
def _bipartite_match_fake(
    metric: Tensor,
    r: int,
    protect: int,
    threshold: float | None,
    bias: Tensor | None,
    src: Tensor | None,
    dst: Tensor | None,
    sorted_order: bool,
    static_shape: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, n, _ = metric.shape
    n_out = n if threshold is not None else n - r
    shapes = ((batch, n), (batch,), (batch, n_out + 1), (batch, n))
    assign, counts, offsets, members = (metric.new_empty(shape, dtype=torch.int32) for shape in shapes)
    return assign, counts, offsets, members


@torch.library.register_fake("fastok::nearest")
def _nearest_fake(x: Tensor, y: Tensor, k: int, similarity: str, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], x.shape[1], k)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int64)
