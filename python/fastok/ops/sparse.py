"""Which cached tokens matter: channel calibration, label scores and token selection."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..reference import sparse as reference
from .autograd import without_gradient
from .checks import (
    ACTIVATIONS,
    FLOATS,
    INTEGERS,
    check_dtype,
    check_int,
    check_number,
    check_range,
    check_same_device,
    check_shape,
    check_tensor,
)

if TYPE_CHECKING:
    from ..caches.labels import LabelCache

STATISTICS = ("qk", "q", "k", "fisher")
LAYOUTS = ("interleaved", "halves")


def calibrate_channels(q: Tensor, k: Tensor, r: int, *, statistic: str = "qk") -> Tensor:
    """The ``r`` channels of each head that tell best which keys a query attends to: Double Sparsity's label channels.

    Args:
        q: queries ``[B,S,H,D]``, any float dtype.
        k: keys ``[B,S,G,D]`` of the same tokens, H a multiple of G.
        r: how many channels, within [1, D].
        statistic: published, the mean over tokens of ``"qk"`` |q * k| (both after rotary embedding, each token with
            itself), ``"q"`` |q| or ``"k"`` |k| (before rotary embedding). Not published: ``"fisher"``, after rotary
            embedding, see below.

    Returns:
        int64 ``[H,r]`` (``[G,r]`` for ``"k"``), best first; ties go to the lowest channel, NaN sorts last.

    Raises:
        TypeError, ValueError: an argument of another type, shape or range.

    The published statistics choose the channels where queries and keys are large, which need not be those where one
    key differs from the next. ``"fisher"`` greedily maximises Fisher's discriminant ratio of the label score between
    what is attended to and what is not: its mean over the distant keys weighted with the query's attention, less its
    plain mean over them, squared over its variance over them, each summed over the queries first. Each row of q and k
    is taken for a sequence under causal attention with scale D^-1/2, distant are keys of an earlier eighth of it than
    the query's, and a row of one token says nothing. Costs about what attention does.

    Sums are taken in fp64; deterministic. Yang et al., "Post-Training Sparse Attention with Double Sparsity", arXiv
    2408.07092; Fisher, "The Use of Multiple Measurements in Taxonomic Problems", 1936.
    """
    check_heads(q, k)
    check_int("r", r)
    if not 1 <= r <= q.shape[3]:
        raise ValueError(f"r must be within [1, D={q.shape[3]}], got {r}")
    check_statistic(statistic)
    return reference.calibrate_channels(q, k, r, statistic=statistic)


def rotary_channels(channels: Tensor, head_dim: int, *, to: str = "interleaved") -> Tensor:
    """The same channels of a model whose rotary embedding lays out its pairs the other way.

    Args:
        channels: int64 of any shape, within [0, ``head_dim``).
        head_dim: D, even.
        to: ``"interleaved"``: from transformers' layout, where channels c and c + D/2 turn together, to that of
            checkpoints as first published, where 2c and 2c + 1 do; ``"halves"``: back.

    Returns:
        int64 of the shape of ``channels``.

    Raises:
        TypeError, ValueError: an argument of another dtype or range.

    Deterministic; no host synchronisation on CUDA but for the check of the range. Double Sparsity's release does the
    former between calibration and its own kernels.
    """
    check_int("head_dim", head_dim)
    if head_dim <= 0 or head_dim % 2:
        raise ValueError(f"head_dim must be positive and even, got {head_dim}")
    if to not in LAYOUTS:
        raise ValueError(f"to must be one of {', '.join(map(repr, LAYOUTS))}; got {to!r}")
    check_dtype("channels", channels, (torch.int64,))
    check_range("channels", channels, 0, head_dim)
    columns = head_dim // 2 if to == "interleaved" else 2
    return channels % columns * (head_dim // columns) + channels // columns


def check_statistic(statistic: str) -> None:
    """ValueError unless it is one of Double Sparsity's."""
    if statistic not in STATISTICS:
        raise ValueError(f"statistic must be one of {', '.join(map(repr, STATISTICS))}; got {statistic!r}")


def check_heads(q: Tensor, k: Tensor) -> None:
    """``q`` and ``k`` are ``[B,S,H,D]`` and ``[B,S,G,D]`` with H a multiple of G."""
    check_dtype("q", q, FLOATS)
    check_dtype("k", k, FLOATS)
    if q.dim() != 4:
        raise ValueError(f"q must be [B,S,H,D], got shape {list(q.shape)}")
    check_shape("k", k, (q.shape[0], q.shape[1], None, q.shape[3]), "[B,S,G,D] like q[B,S,H,D]")
    check_same_device("k", k, "q", q.device)
    if k.shape[2] == 0 or q.shape[2] % k.shape[2] != 0:
        raise ValueError(f"q must have a multiple of k's {k.shape[2]} heads, got {q.shape[2]}")


def label_scores(
    q: Tensor, labels: "LabelCache", *, shared: bool | str = True, seq_lens: Tensor | None = None
) -> Tensor:
    """What the label channels say about how much each cached token matters to the newest queries.

    Args:
        q: queries ``[B,S,H,D]``, or ``[B,H,D]`` for one row, after rotary embedding. With several rows the largest
            score of them counts.
        labels: the cached tokens' labels.
        shared: one score per KV head, the largest of its group's query heads (``"sum"``: their sum), so that one token
            list serves them all.
        seq_lens: int ``[B]``, tokens from there on get -inf; None: all are there.

    Returns:
        fp32 ``[B,G,T]``, or ``[B,H,T]`` if not ``shared``: dot products over the label channels, unscaled.

    Raises:
        TypeError, ValueError: an argument of another type or shape. RuntimeError: an empty `LabelCache`.

    Deterministic and batch-invariant; no host synchronisation; no gradient.
    """
    arguments = label_arguments(q, labels, shared, seq_lens)
    scores = torch.ops.fastok.label_scores(*arguments, seq_lens)
    return scores.unflatten(1, (labels.kv_heads, -1)).sum(2) if shared == "sum" else scores


def label_tokens(
    q: Tensor,
    labels: "LabelCache",
    k: int,
    *,
    sink: int = 0,
    recent: int = 0,
    shared: bool | str = True,
    seq_lens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`select_tokens` of `label_scores`; on CPUs the scores stay in the caches. Arguments and errors as there."""
    if shared == "sum":
        return select_tokens(label_scores(q, labels, shared=shared, seq_lens=seq_lens), k, sink=sink, recent=recent,
                             seq_lens=seq_lens)  # fmt: skip
    arguments = label_arguments(q, labels, shared, seq_lens)
    most = most_tokens(k, None, sink, recent, labels.data.shape[3])
    return torch.ops.fastok.label_tokens(*arguments, most, sink, recent, seq_lens)


def check_labels(labels: object) -> None:
    """TypeError unless it is a `LabelCache`."""
    if not hasattr(labels, "kv_heads"):
        raise TypeError(f"labels must be a fastok.sparse.LabelCache, got {type(labels).__name__}")


def check_shared(shared: bool | str) -> None:
    """ValueError unless it says how the query heads of a KV head choose."""
    if shared not in (True, False, "sum"):
        raise ValueError(f"shared must be True (the largest of a group), False or 'sum', got {shared!r}")


def label_arguments(
    q: Tensor, labels: "LabelCache", shared: bool | str, seq_lens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, int, bool]:
    """What the ops take: queries, codes, scales, channels, KV heads, whether the largest of a group is wanted."""
    check_labels(labels)
    check_shared(shared)
    data, scale, channels = labels.data, labels.scale, labels.channels
    q = query_rows(q)
    check_dtype("q", q, ACTIVATIONS)
    check_shape("q", q, (data.shape[0], None, None, labels.head_dim), "[B,S,H,D] of the label cache")
    if q.shape[1] == 0:
        raise ValueError("q must have at least one row, got none")
    check_same_device("q", q, "labels", data.device)
    if q.shape[2] % labels.kv_heads != 0 or q.shape[2] % channels.shape[0] != 0:
        raise ValueError(
            f"q must have a multiple of the label cache's {labels.kv_heads} KV heads and {channels.shape[0]} lists of "
            f"channels, got {q.shape[2]} heads"
        )
    if seq_lens is not None:
        _check_lengths(seq_lens, q, "q", data.shape[3])
    return without_gradient(q), data, scale, channels, labels.kv_heads, shared != "sum" and bool(shared)


def query_rows(q: Tensor) -> Tensor:
    """``q`` as ``[B,S,H,D]``."""
    check_tensor("q", q)
    if q.dim() == 3:
        return q[:, None]
    if q.dim() != 4:
        raise ValueError(f"q must be [B,S,H,D] or [B,H,D], got shape {list(q.shape)}")
    return q


def select_tokens(
    scores: Tensor,
    k: int | None = None,
    *,
    mass: float | None = None,
    sink: int = 0,
    recent: int = 0,
    seq_lens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The tokens to attend to, per head: sinks, the most recent, and those with the best scores.

    Args:
        scores: fp32 ``[B,G,T]`` (G any number of heads). With ``mass`` they must be non-negative (probabilities);
            negative ones and NaN count as 0 there.
        k: how many tokens at most; None (only with ``mass``): T.
        mass: keep the fewest tokens whose scores reach this share, within (0, 1], of a sequence's sum.
        sink: that many first tokens are always kept; they count inside ``k`` and ``mass``.
        recent: that many last tokens of each sequence are always kept, likewise.
        seq_lens: int ``[B]``, the tokens each sequence has; None: T. A sequence of at most ``k`` tokens keeps all.

    Returns:
        index: int64 ``[B,G,min(k,T)]``, ascending, padded with -1 behind.
        count: int64 ``[B,G]``, how many there are.

    Raises:
        TypeError, ValueError: an argument of another type, shape or range; neither ``k`` nor ``mass``.

    Ties go to the lowest index; NaN sorts last but is taken before nothing at all. Deterministic, no host
    synchronisation.
    """
    check_dtype("scores", scores, (torch.float32,))
    if scores.dim() != 3:
        raise ValueError(f"scores must be [B,G,T], got shape {list(scores.shape)}")
    if seq_lens is not None:
        _check_lengths(seq_lens, scores, "scores", scores.shape[2])
    most = most_tokens(k, mass, sink, recent, scores.shape[2])
    return torch.ops.fastok.select_tokens(scores.detach(), most, mass, sink, recent, seq_lens)


def _check_lengths(seq_lens: Tensor, other: Tensor, name: str, total: int) -> None:
    """``seq_lens`` is int ``[B]`` like ``other``, and within [0, total] where reading it waits for no device."""
    check_dtype("seq_lens", seq_lens, INTEGERS)
    check_shape("seq_lens", seq_lens, (other.shape[0],), "[B]")
    check_same_device("seq_lens", seq_lens, name, other.device)
    if seq_lens.device.type == "cpu":
        check_range("seq_lens", seq_lens, 0, total + 1)


def most_tokens(k: int | None, mass: float | None, sink: int, recent: int, total: int) -> int:
    """How many of ``total`` tokens a selection can have, if these are arguments for one."""
    for name, value in (("k", k), ("sink", sink), ("recent", recent)):
        if value is None and name == "k":
            continue
        check_int(name, value)  # type: ignore[arg-type]
        if value < 0:  # type: ignore[operator]
            raise ValueError(f"{name} must be >= 0, got {value}")
    if k is None and mass is None:
        raise ValueError("give k, how many tokens, or mass, which share of the scores, or both; got neither")
    if mass is not None:
        check_number("mass", mass)
        if not 0 < mass <= 1:
            raise ValueError(f"mass must be within (0, 1], got {mass}")
    if k is not None and sink + recent > k:
        raise ValueError(f"k must have room for sink + recent = {sink + recent} tokens, got {k}")
    return total if k is None else min(k, total)


@torch.library.register_fake("fastok::label_scores")
def _label_scores_fake(
    q: Tensor, data: Tensor, scale: Tensor | None, channels: Tensor, kv_heads: int, shared: bool,
    seq_lens: Tensor | None,
) -> Tensor:  # fmt: skip
    return q.new_empty((q.shape[0], kv_heads if shared else q.shape[2], data.shape[3]), dtype=torch.float32)


@torch.library.register_fake("fastok::select_tokens")
def _select_tokens_fake(
    scores: Tensor, k: int, mass: float | None, sink: int, recent: int, seq_lens: Tensor | None
) -> tuple[Tensor, Tensor]:
    shape = (*scores.shape[:2], k)
    return scores.new_empty(shape, dtype=torch.int64), scores.new_empty(shape[:2], dtype=torch.int64)


@torch.library.register_fake("fastok::label_tokens")
def _label_tokens_fake(
    q: Tensor, data: Tensor, scale: Tensor | None, channels: Tensor, kv_heads: int, shared: bool, k: int, sink: int,
    recent: int, seq_lens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = (q.shape[0], kv_heads if shared else q.shape[2], k)
    return q.new_empty(shape, dtype=torch.int64), q.new_empty(shape[:2], dtype=torch.int64)
