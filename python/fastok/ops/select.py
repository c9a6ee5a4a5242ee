"""``top_tokens``, ``sample_cdf`` and ``density_peaks``: checks and fake kernels; the kernels are in csrc/select."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ..token_map import TokenMap
from .checks import ACTIVATIONS, check_dtype, check_int, check_same_device, check_shape


def top_tokens(
    scores: Tensor,
    k: int | Sequence[int] | Tensor,
    *,
    protect: int = 0,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    order: str = "index",
) -> Tensor:
    """The tokens with the highest scores, over all tokens or with a budget for each segment of them.

    Args:
        scores: ``[B,N]`` fp32, fp16 or bf16, any strides. No gradient flows through it.
        k: how many tokens to choose besides the protected ones. With ``segments``, a budget for each segment: a list,
            or an integer tensor ``[n_segments]`` (whose values are read, which on CUDA waits for the device).
        protect: that many leading tokens are always kept, whatever their score, mask or segment, and not counted in k.
        mask: bool ``[B,N]``, True for the tokens that may be chosen. None allows all.
        segments: int64 ``[B,N]``, the segment of each token (crop, frame, row), from 0 to n_segments - 1 in any order.
            Tokens of another number (-1 for padding, say) belong to no segment and count as masked. Segments may be
            empty.
        order: ``"index"``: ascending positions. ``"score"``: the protected tokens, then best first.

    Returns:
        int64 ``[B,K]``, K = protect + k (with ``segments``, protect + sum(k)), all different within a sample and all
        valid positions. Where a sample's mask, NaN scores or short segments leave fewer tokens than were asked for,
        others make up the number: first the best ones that may be chosen but exceeded their own segment's budget, then
        those whose score is NaN, then masked ones, the last two by ascending position. (``mask.gather(1, index)`` is
        False for the latter.)

    Raises:
        TypeError: a dtype that is not listed, ``k`` or ``protect`` not of the kinds above.
        ValueError: a negative budget, more than the N - protect tokens there are, ``protect`` outside [0, N], an int
            ``k`` with ``segments`` or several without, shapes or devices that do not fit, an unknown order.

    Deterministic and batch-invariant; equal scores (0 and -0 are) go to the lowest index, -inf is the lowest score,
    NaN comes after it. No host synchronisation.
    """
    _check_scores(scores, protect)
    n = scores.shape[1]
    budgets = _budgets(k, of_segments=segments is not None)
    if segments is not None:
        check_dtype("segments", segments, (torch.int64,))
        check_shape("segments", segments, tuple(scores.shape), "[B,N] of scores")
        check_same_device("segments", segments, "scores", scores.device)
    if any(budget < 0 for budget in budgets):
        raise ValueError(f"k must be >= 0, got {k}")
    if sum(budgets) > n - protect:
        raise ValueError(f"k must be at most N - protect = {n - protect} in total, got {k}")
    if mask is not None:
        check_dtype("mask", mask, (torch.bool,))
        check_shape("mask", mask, tuple(scores.shape), "[B,N] of scores")
        check_same_device("mask", mask, "scores", scores.device)
    if order != "index" and order != "score":
        raise ValueError(f"order must be 'index' or 'score', got {order!r}")
    return torch.ops.fastok.top_tokens(scores.detach(), budgets, protect, mask, segments, order == "score")


def sample_cdf(scores: Tensor, k: int, *, protect: int = 0) -> TokenMap:
    """Adaptive token sampling: the tokens in which evenly spaced heights meet the scores' cumulative distribution.

    With F the cumulative distribution of the unprotected tokens' scores in ascending order, less its least value,
    k - protect heights are spaced evenly from F's least positive value to its largest; each picks the token whose F is
    nearest (the less significant of two). Peaked scores make heights meet in the same tokens, of which one stays: how
    many are kept depends on the sample. The least significant token is never picked unless it is the only one.

    Args:
        scores: ``[B,N]`` fp32, fp16 or bf16, any strides, significance of each token: non-negative, of any scale.
            Negative scores count as 0, infinite ones as the largest float, NaN is never picked; if all are 0, they
            are equal. No gradient flows through it.
        k: how many tokens to keep at most, at least ``protect``; more than N is allowed (the heights grow denser).
        protect: that many leading tokens are always kept, counted in k, and take no part in the distribution.

    Returns:
        A ragged :class:`TokenMap` that keeps tokens as they are: the protected ones in slots 0 to protect - 1, then
        the picked ones by ascending significance, as published. ``n_out`` is min(k, N), ``counts`` says how many slots
        each sample uses.

    Raises:
        TypeError: a dtype that is not listed, ``k`` or ``protect`` not an int.
        ValueError: ``scores`` not ``[B,N]``, ``protect`` outside [0, N], ``k`` less than ``protect``.

    Sums are in fp64 and in the same order everywhere: deterministic, batch-invariant, and the same on every device.
    Equal scores rank by ascending index. No host synchronisation. Adaptive Token Sampling, Fayyaz et al., ECCV 2022.
    """
    _check_scores(scores, protect)
    check_int("k", k)
    if k < protect:
        raise ValueError(f"k must be at least protect={protect}, whose tokens are counted in it; got {k}")
    assign, counts, offsets, members = torch.ops.fastok.sample_cdf(scores.detach(), k, protect)
    return TokenMap(assign, offsets.shape[1] - 1, counts, offsets, members)


def density_peaks(x: Tensor, k: int, *, neighbors: int) -> Tensor:
    """Centres of clusters: the tokens that are dense and far from any denser token (DPC-KNN).

    Distances are Euclidean, divided by sqrt(D). A token's density is exp(-mean squared distance to its ``neighbors``
    nearest tokens), itself included; its separation is the distance to the nearest denser token, for the densest token
    that to the farthest. The k tokens with the largest product are chosen.

    Args:
        x: ``[B,N,D]`` fp32, fp16 or bf16. Any strides; not copied if the last dimension is contiguous. No gradient
            flows through it.
        k: how many centres, from 0 to N.
        neighbors: how many nearest tokens the density is taken over, from 1 to N.

    Returns:
        int64 ``[B,k]``, by descending product.

    Raises:
        TypeError: a dtype that is not listed, ``k`` or ``neighbors`` not an int.
        ValueError: ``x`` not ``[B,N,D]``, ``k`` or ``neighbors`` out of range.

    Computed in fp32; the product is compared by its logarithm, so that it never vanishes. Ties go to the lowest index:
    of equally dense tokens the first is the denser one, so that of equal tokens only the first can be a centre while
    others remain. Tokens that hold NaN or infinity are no one's neighbours and come last. Deterministic and
    batch-invariant; the kernels never hold N x N distances. No host synchronisation. Du et al., Knowledge-Based
    Systems 2016, as used for tokens by TCFormer, Zeng et al., CVPR 2022.
    """
    check_dtype("x", x, ACTIVATIONS)
    if x.dim() != 3:
        raise ValueError(f"x must be [B,N,D], got shape {list(x.shape)}")
    n = x.shape[1]
    check_int("k", k)
    check_int("neighbors", neighbors)
    if not 0 <= k <= n:
        raise ValueError(f"k must be within [0, N={n}], got {k}")
    if not 1 <= neighbors <= max(n, 1):
        raise ValueError(f"neighbors must be within [1, N={n}], got {neighbors}")
    return torch.ops.fastok.density_peaks(x.detach(), k, neighbors)


def _check_scores(scores: Tensor, protect: int) -> None:
    check_dtype("scores", scores, ACTIVATIONS)
    if scores.dim() != 2:
        raise ValueError(f"scores must be [B,N], got shape {list(scores.shape)}")
    check_int("protect", protect)
    if not 0 <= protect <= scores.shape[1]:
        raise ValueError(f"protect must be within [0, N={scores.shape[1]}], got {protect}")


def _budgets(k: int | Sequence[int] | Tensor, of_segments: bool) -> list[int]:
    """The budget of each segment; the one budget where there are none."""
    several = isinstance(k, (list, tuple, Tensor))
    if several and not of_segments:
        raise ValueError(f"k must be an int without segments, got {k!r}")
    if isinstance(k, int) and of_segments:
        raise ValueError(f"k must have a budget for each segment when segments are given, got {k!r}")
    if isinstance(k, Tensor):
        if k.is_floating_point() or k.is_complex() or k.dtype == torch.bool:
            raise TypeError(f"k must be an integer tensor, got {str(k.dtype).removeprefix('torch.')}")
        check_shape("k", k, (None,), "[n_segments]")
        return [int(budget) for budget in k.tolist()]
    budgets = list(cast(Sequence[int], k)) if several else [cast(int, k)]
    for budget in budgets:
        check_int("k", budget)
    return budgets


@torch.library.register_fake("fastok::top_tokens")
def _top_tokens_fake(
    scores: Tensor, k: Sequence[int], protect: int, mask: Tensor | None, segments: Tensor | None, by_score: bool
) -> Tensor:
    return scores.new_empty((scores.shape[0], protect + sum(k)), dtype=torch.int64)


@torch.library.register_fake("fastok::sample_cdf")
def _sample_cdf_fake(scores: Tensor, k: int, protect: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, n = scores.shape
    shapes = ((batch, n), (batch,), (batch, torch.sym_min(k, n) + 1), (batch, n))
    assign, counts, offsets, members = (scores.new_empty(shape, dtype=torch.int32) for shape in shapes)
    return assign, counts, offsets, members


@torch.library.register_fake("fastok::density_peaks")
def _density_peaks_fake(x: Tensor, k: int, neighbors: int) -> Tensor:
    return x.new_empty((x.shape[0], k), dtype=torch.int64)
