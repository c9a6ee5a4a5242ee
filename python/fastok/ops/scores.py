"""``ScoreSpec``: what to export of an attention matrix, and what is left to do once its columns have been reduced."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_int

REDUCE = ("sum", "mean", "max", "none")
NORMALIZE = (None, "visible", "causal", "cols")
HEADS = ("none", "mean", "sum", "max", "group_mean", "group_sum")
VALUE_NORMS = {None: None, "l1": 1, "l2": 2}
END = 2**31 - 1  # "to the end" where an int is needed

Slice = tuple[int, int | None]


@dataclass(frozen=True)
class ScoreSpec:
    """Which statistic of P = softmax(scale * Q K^T + bias) to export.

    Args:
        rows: the queries that count: ``"all"``, ``"last"``, one index, a slice ``(start, stop)`` (negative from the
            end, ``stop=None`` to the end), or a LongTensor of indices, in which repeated ones count twice. For packed
            sequences they are taken of each sequence; rows that a sequence does not have count as 0.
        cols: the slice of keys to export; None: all. Not for packed sequences.
        reduce: over the rows: ``"sum"``, ``"mean"``, ``"max"``, or ``"none"``, which keeps them.
        normalize: None; ``"visible"``, divide each key by the number of selected rows that can see it; ``"causal"``,
            by T - j (ZipCache's released code); ``"cols"``, take the softmax over the selected columns only.
        heads: ``"none"``, ``"mean"``, ``"sum"``, ``"max"``, or ``"group_mean"``, ``"group_sum"`` over the query heads
            of one KV head.
        logits: the scores before the softmax. A key that a row does not see has logit -inf, which sums and means leave
            out.
        value_norm: multiply by the ``"l1"`` or ``"l2"`` norm of each key's value.
        pool: odd width of a mean over neighbouring keys at the end; borders are padded with zeros that count.

    Applied in this order: softcap, bias, softmax (or logits), value norm, heads, rows, normalize, pool.
    """

    rows: str | int | Slice | Tensor = "all"
    cols: Slice | None = None
    reduce: str = "sum"
    normalize: str | None = None
    heads: str = "mean"
    logits: bool = False
    value_norm: str | None = None
    pool: int | None = None

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("reduce", self.reduce, REDUCE),
            ("normalize", self.normalize, NORMALIZE),
            ("heads", self.heads, HEADS),
            ("value_norm", self.value_norm, tuple(VALUE_NORMS)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")
        if self.logits and self.normalize == "cols":
            raise ValueError("normalize='cols' is a softmax; it cannot go with logits=True")
        if self.pool is not None:
            check_int("pool", self.pool)
        if self.pool is not None and (self.pool < 1 or self.pool % 2 == 0):
            raise ValueError(f"pool must be an odd number of keys, at least 1; got {self.pool}")
        if isinstance(self.rows, Tensor):
            if self.rows.dim() != 1 or self.rows.dtype != torch.int64:
                raise TypeError(
                    f"rows must be int64 [R], got {str(self.rows.dtype).removeprefix('torch.')} {list(self.rows.shape)}"
                )
        elif isinstance(self.rows, str):
            if self.rows not in ("all", "last"):
                raise ValueError(f"rows must be 'all', 'last', an int, a slice or a LongTensor; got {self.rows!r}")
        else:
            _check_slice("rows", self.rows)
        if self.cols is not None:
            if not isinstance(self.cols, tuple):
                raise TypeError(f"cols must be None or (start, stop), got {type(self.cols).__name__}")
            _check_slice("cols", self.cols)

    def row_slice(self) -> Slice:
        """The rows as a slice; of all for a LongTensor."""
        if isinstance(self.rows, int):
            return self.rows, None if self.rows == -1 else self.rows + 1
        if isinstance(self.rows, tuple):
            return self.rows
        return (-1, None) if isinstance(self.rows, str) and self.rows == "last" else (0, None)

    def by_position(self) -> bool:
        """Whether finishing it takes to know where each key stands."""
        return self.reduce == "mean" or self.normalize in ("visible", "causal") or self.pool is not None

    def head_group(self, heads: int, kv_heads: int) -> int:
        """How many query heads make one of the result."""
        return head_group(self.heads, heads, kv_heads)


def head_group(which: str, heads: int, kv_heads: int) -> int:
    """How many query heads make one of the result, for ``ScoreSpec.heads``."""
    if which == "none":
        return 1
    return heads // kv_heads if which.startswith("group") else heads


def _check_slice(name: str, value: int | Slice) -> None:
    parts = value if isinstance(value, tuple) else (value,)
    if isinstance(value, tuple) and len(value) != 2:
        raise ValueError(f"{name} must be (start, stop), got {value!r}")
    for part, optional in zip(parts, (False, True), strict=False):
        if part is not None or not optional:
            check_int(name, part)  # type: ignore[arg-type]


def resolve(piece: Slice, length: int) -> tuple[int, int]:
    """What ``[start:stop]`` takes of ``length`` items, both bounds within it."""
    start, stop = piece
    start = max(start + length, 0) if start < 0 else min(start, length)
    stop = length if stop is None else max(stop + length, 0) if stop < 0 else min(stop, length)
    return start, max(stop, start)


def unresolved(piece: Slice) -> tuple[int, int]:
    """The bounds as the op takes them for packed sequences: negative ones from each sequence's end."""
    start, stop = piece
    return start, END if stop is None else stop


@dataclass(frozen=True)
class Sequences:
    """Where each key stands: ``[T]`` positions, how long its sequence's queries and keys are, and which one that is."""

    position: Tensor
    n_q: Tensor | int
    n_k: Tensor | int
    number: Tensor | None = None  # packed only; keys behind the last sequence have one of their own


def sequences_of(n_q: int, n_k: int, cu_q: Tensor | None, cu_k: Tensor | None, device: torch.device) -> Sequences:
    """For ``n_k`` keys, packed ones if there are ``cu_seqlens``."""
    position = torch.arange(n_k, device=device)
    if cu_q is None or cu_k is None:
        return Sequences(position, n_q, n_k)
    number = torch.searchsorted(cu_k[1:], position, right=True)
    own = number.clamp(max=len(cu_k) - 2)
    return Sequences(position - cu_k[own], cu_q.diff()[own], cu_k.diff()[own], number)


def selected_rows(spec: ScoreSpec, sequences: Sequences, left: int, right: int, seeing: bool) -> Tensor:
    """For each key, how many of its sequence's selected rows there are, or (``seeing``) can see it by position."""
    low = torch.zeros_like(sequences.position)
    n_q = low + sequences.n_q  # not torch.tensor(n_q), which would compile for each length anew
    high = n_q - 1
    if seeing:
        at = sequences.position - sequences.n_k + n_q
        if right >= 0:
            low = torch.maximum(low, at - right)
        if left >= 0:
            high = torch.minimum(high, at + left)
    if isinstance(spec.rows, Tensor):
        ordered = spec.rows.to(n_q.device).sort().values
        counts = torch.searchsorted(ordered, high, right=True) - torch.searchsorted(ordered, low)
    else:
        start, stop = unresolved(spec.row_slice())
        first = (n_q + start).clamp(min=0) if start < 0 else torch.full_like(n_q, start)
        last = n_q + stop if stop < 0 else n_q.clamp(max=stop)
        counts = torch.minimum(last - 1, high) - torch.maximum(first, low) + 1
    return counts.clamp(min=0)


def over_heads(which: str, scores: Tensor, group: int, keeps_rows: bool) -> Tensor:
    """Means of reduced columns ``[…, heads, (R,) T']`` for ``ScoreSpec.heads``; one head is no axis."""
    if which in ("mean", "group_mean"):
        scores = scores / group
    if which in ("mean", "sum", "max"):
        scores = scores.squeeze(-3 if keeps_rows else -2)
    return scores


def finish(spec: ScoreSpec, scores: Tensor, sequences: Sequences, cols: slice, left: int, right: int) -> Tensor:
    """What is left to do ``by_position``: means over rows, normalisation and pooling of columns ``[…, T']``."""
    if spec.reduce == "mean":
        scores = scores / selected_rows(spec, sequences, left, right, seeing=False)[cols].clamp(min=1)
    if spec.normalize == "visible":
        scores = scores / selected_rows(spec, sequences, left, right, seeing=True)[cols].clamp(min=1)
    elif spec.normalize == "causal":
        scores = scores / (sequences.n_k - sequences.position)[cols].clamp(min=1)
    if spec.pool is not None and spec.pool > 1 and scores.numel() > 0:
        scores = _pooled(scores, spec.pool, sequences.number)
    return scores


def _pooled(scores: Tensor, width: int, number: Tensor | None) -> Tensor:
    """Means over ``width`` neighbouring keys of one sequence, missing ones counted as 0."""
    if number is None:
        return F.avg_pool1d(scores.reshape(-1, 1, scores.shape[-1]), width, 1, width // 2).view_as(scores)
    n, borders = scores.shape[-1], (width // 2, width // 2)
    padded, numbers = F.pad(scores, borders), F.pad(number, borders, value=-1)
    total = torch.zeros_like(scores)
    for i in range(width):
        total = total + torch.where(numbers[i : i + n] == number, padded[..., i : i + n], 0)
    return total / width
