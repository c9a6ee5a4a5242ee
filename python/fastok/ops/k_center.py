"""``k_center``: checks and fake kernel; the kernels are in csrc/k_center."""

import torch
from torch import Tensor

from .checks import ACTIVATIONS, check_dtype, check_int, check_range, check_same_device, check_shape

METRICS = ("cosine", "euclidean")
OBJECTIVES = ("max_min", "max_sum")
STARTS = ("isolated", "norm", "first")


def k_center(
    x: Tensor,
    k: int,
    *,
    metric: str = "cosine",
    objective: str = "max_min",
    start: str | int | Tensor = "isolated",
    mask: Tensor | None = None,
    candidates_scored: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Greedy farthest-point selection: each pick is the token farthest from those picked before it.

    Args:
        x: ``[B,N,D]`` fp32, fp16 or bf16. Any strides; not copied if the last dimension is contiguous.
        k: how many tokens to pick, from 0 to N.
        metric: ``"cosine"`` (distance 1 - cos, from 0 to 2) or ``"euclidean"``.
        objective: what a pick maximises: ``"max_min"``, its smallest distance to the earlier picks (k-center,
            DivPrune), or ``"max_sum"``, the sum of its distances to them (ToDRE).
        start: the first pick. ``"isolated"``: the token whose nearest other token is farthest; ``"norm"``: the longest;
            ``"first"``: the lowest; an int, or int64 ``[B]``: that token.
        mask: bool ``[B,N]``, True for the tokens that may be picked. None allows all.
        candidates_scored: how many candidate centres to compare with all tokens in one matrix product, before knowing
            which of them will be picked. Changes the time it takes, never the result; None lets a planner choose, 1
            compares each pick alone.

    Returns:
        ``index`` int64 ``[B,k]`` in pick order and ``distance`` fp32 ``[B,k]``, the pick's objective when it was
        picked: its smallest or summed distance to the earlier picks. For the first pick that is inf, except with
        ``start="isolated"``: the distance to its nearest other token (inf if it is the only one).

    Raises:
        TypeError: ``x`` or ``mask`` of another dtype, ``k`` or ``candidates_scored`` not an int.
        ValueError: ``k`` outside [0, N], an unknown metric, objective or start, ``start`` outside [0, N), shapes or
            devices that do not fit. On the CPU, values are looked at: ``k`` above the number of unmasked tokens of a
            sample, a ``start`` that the mask forbids. On CUDA and under ``torch.compile`` they are not; then a start
            that is not available gives way to the lowest available token, and what is missing is index -1, distance
            -inf.

    A masked or already picked token is never picked. Tokens with a NaN or an infinity count as masked while others
    remain; then they are picked in ascending order, at distance NaN. Ties go to the lowest index; a zero vector is at
    cosine distance 1 from everything. Cosines and Euclidean distances are computed in fp64 from exact sums and rounded
    to fp32 once (``fastok.reference.k_center`` says how), so picks and distances are the same bits on every backend,
    with any number of threads and in any batch. 1 - cos is taken of the rounded cosine: among near duplicates it is a
    multiple of 2^-24. Not differentiable. No host synchronisation on CUDA. DivPrune, Alvar et al., CVPR 2025; ToDRE, Li
    et al., 2025; greedy k-center, Gonzalez, 1985.
    """
    check_dtype("x", x, ACTIVATIONS)
    if x.dim() != 3:
        raise ValueError(f"x must be [B,N,D], got shape {list(x.shape)}")
    batch, n, _ = x.shape
    check_int("k", k)
    if not 0 <= k <= n:
        raise ValueError(f"k must be within [0, N={n}], got {k}")
    for name, value, allowed in (("metric", metric, METRICS), ("objective", objective, OBJECTIVES)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    if candidates_scored is not None:
        check_int("candidates_scored", candidates_scored)
        if candidates_scored < 1:
            raise ValueError(f"candidates_scored must be at least 1, got {candidates_scored}")
    if mask is not None:
        check_dtype("mask", mask, (torch.bool,))
        check_shape("mask", mask, (batch, n), "[B,N] of x")
        check_same_device("mask", mask, "x", x.device)
    first = None if isinstance(start, str) else _first_tokens(start, x)
    if isinstance(start, str) and start not in STARTS:
        raise ValueError(f"start must be one of {', '.join(STARTS)}, an int or a tensor [B]; got {start!r}")
    if mask is not None and x.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_available(k, mask, first)
    rule = start if isinstance(start, str) else "given"
    return torch.ops.fastok.k_center(x.detach(), k, metric, objective, rule, first, mask, candidates_scored or 0)


def _first_tokens(start: int | Tensor, x: Tensor) -> Tensor:
    """The first pick of each sample as int64 ``[B]``."""
    batch, n, _ = x.shape
    if isinstance(start, Tensor):
        check_shape("start", start, (batch,), "[B] of x")
        check_same_device("start", start, "x", x.device)
        if x.is_cuda:
            if start.dtype != torch.int64:
                raise TypeError(f"start must be int64, got {str(start.dtype).removeprefix('torch.')}")
        else:
            check_range("start", start, 0, n)
        return start.long()
    check_int("start", start)
    if not 0 <= start < n:
        raise ValueError(f"start must be within [0, N={n}), got {start}")
    return torch.full((batch,), start, dtype=torch.int64, device=x.device)


def _check_available(k: int, mask: Tensor, first: Tensor | None) -> None:
    available = mask.sum(1)
    if mask.shape[0] and int(available.min()) < k:
        sample = int(available.argmin())
        raise ValueError(
            f"k must be at most the number of unmasked tokens, {int(available[sample])} in sample {sample}; got {k}"
        )
    if first is not None and k > 0 and not bool(mask.gather(1, first[:, None]).all()):
        sample = int((~mask.gather(1, first[:, None])[:, 0]).int().argmax())
        raise ValueError(f"start must be a token that mask allows, got {int(first[sample])} in sample {sample}")


@torch.library.register_fake("fastok::k_center")
def _k_center_fake(
    x: Tensor,
    k: int,
    metric: str,
    objective: str,
    start: str,
    first: Tensor | None,
    mask: Tensor | None,
    candidates_scored: int,
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], k)
    return x.new_empty(shape, dtype=torch.int64), x.new_empty(shape, dtype=torch.float32)
