"""The one currency of fastok: every token reduction is a map from N input tokens to M output tokens."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Union, overload

import torch
from torch import Tensor

from .ops import checks as _checks
from .ops import merge as _ops
from .ops.autograd import call as _call

Mode = Literal["mean", "sum", "max", "first"]


@dataclass(frozen=True, eq=False)
class TokenMap:
    """A batch of many-to-one maps from N input tokens to M output slots.

    Build one with :meth:`from_assign`, :meth:`keep` or :meth:`identity`, or get one from a matching or a reducer. The
    plain constructor trusts its arguments.

    Attributes:
        assign: int32 ``[B,N]``, the output slot of each input token, -1 = dropped.
        n_out: M, the number of output slots (capacity).
        counts: int32 ``[B]``, slots used per sample: all M, unless the map is ragged.
        offsets: int32 ``[B,M+1]``, and
        members: int32 ``[B,N]``: the same map as CSR. The tokens of slot m are ``members[offsets[m]:offsets[m+1]]``,
            ascending; entries past ``offsets[M]`` are -1.
    """

    assign: Tensor
    n_out: int
    counts: Tensor
    offsets: Tensor = field(repr=False)
    members: Tensor = field(repr=False)

    @classmethod
    def from_assign(cls, assign: Tensor, n_out: int, counts: Tensor | None = None) -> "TokenMap":
        """The map that sends token i of sample b to slot ``assign[b,i]``.

        Args:
            assign: integer ``[B,N]`` with values from -1 (dropped) to ``n_out - 1``. Values are checked on the host,
                which on CUDA waits for the device once; inside ``torch.compile`` they are trusted.
            n_out: number of output slots M.
            counts: int ``[B]``, slots used per sample, by default M for each.

        Raises:
            TypeError: ``assign`` or ``counts`` is not an integer tensor.
            ValueError: wrong shape, a value out of range, or ``counts`` that leave out a slot in use.
        """
        assign = _ops.checked_assign(assign, n_out)
        if counts is None:
            counts = torch.full((assign.shape[0],), n_out, dtype=torch.int32, device=assign.device)
        else:
            counts = _ops.checked_counts(counts, assign, n_out)
        return cls(assign, n_out, counts, *torch.ops.fastok.build_map(assign, n_out))

    @classmethod
    def keep(cls, indices: Tensor, n_in: int) -> "TokenMap":
        """Pure pruning: output slot j is input token ``indices[b,j]``; all other tokens are dropped.

        Args:
            indices: integer ``[B,K]``, different within a row, in the order wanted.
            n_in: number of input tokens N.

        Raises:
            ValueError: an index out of range or given twice (checked as in :meth:`from_assign`).
        """
        indices = _ops.checked_indices(indices, n_in)
        batch, n_out = indices.shape
        slots = torch.arange(n_out, dtype=torch.int32, device=indices.device).expand(batch, n_out)
        assign = torch.full((batch, n_in), -1, dtype=torch.int32, device=indices.device)
        assign = assign.scatter(1, indices, slots)
        counts = torch.full((batch,), n_out, dtype=torch.int32, device=indices.device)
        return cls(assign, n_out, counts, *torch.ops.fastok.build_map(assign, n_out))

    @classmethod
    def identity(cls, batch: int, n: int, device: torch.device | str | None = None) -> "TokenMap":
        """The map that leaves ``n`` tokens as they are. TypeError or ValueError unless both numbers are ints >= 0."""
        _checks.check_at_least("batch", batch, 0)
        _checks.check_at_least("n", n, 0)
        assign = torch.arange(n, dtype=torch.int32, device=device).repeat(batch, 1)
        return cls._trusted(assign, n)

    @classmethod
    def _trusted(cls, assign: Tensor, n_out: int, counts: Tensor | None = None) -> "TokenMap":
        if counts is None:
            counts = torch.full((assign.shape[0],), n_out, dtype=torch.int32, device=assign.device)
        return cls(assign, n_out, counts, *torch.ops.fastok.build_map(assign, n_out))

    @property
    def n_in(self) -> int:
        """N, the number of input tokens."""
        return self.assign.shape[1]

    @property
    def batch_size(self) -> int:
        """B, the number of samples."""
        return self.assign.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the map lives."""
        return self.assign.device

    def merge(self, x: Tensor, *, size: Tensor | None = None, mode: Mode = "mean") -> tuple[Tensor, Tensor]:
        """Reduce the tokens of each slot to one.

        Args:
            x: ``[B,N,C]``, fp32, fp16, bf16 (or fp64). Any strides; not copied if the last dimension is contiguous.
            size: fp32 ``[B,N]``, how many original tokens each token stands for; None means 1. Weights ``"mean"`` only.
            mode: ``"mean"`` (weighted by size), ``"sum"`` (plain), ``"max"``, or ``"first"`` (the lowest-index member).

        Returns:
            ``y[B,M,C]`` in the dtype of ``x``, and fp32 ``size_out[B,M]``, the sum of the sizes of each slot's members.
            Empty slots are 0; so is the mean of a slot whose sizes sum to 0.

        Raises:
            TypeError: a dtype that is not listed.
            ValueError: a shape or device that does not fit the map, or an unknown mode.

        Sums accumulate in fp32 in ascending source order, without atomics: results are bitwise repeatable and do not
        depend on the batch. Differentiable in ``x`` (all modes; ``"max"`` sends the gradient to the lowest-index
        maximum) and in ``size``, once. No host synchronisation. Weighted mean as in Token Merging (Bolya et al.,
        ICLR 2023).
        """
        _ops.check_input_side(x, self, size)
        if mode not in _ops.MODES:
            raise ValueError(f"mode must be one of {', '.join(_ops.MODES)}; got {mode!r}")
        return _call(torch.ops.fastok.merge.default, x, self.assign, self.offsets, self.members, size, mode)

    def unmerge(self, y: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """Give every input token the row of the slot it went to.

        Args:
            y: ``[B,M,C]``, fp32, fp16, bf16 (or fp64). Any strides; not copied if the last dimension is contiguous.
            residual: ``[B,N,C]`` in the dtype of ``y``, added to the result in fp32.

        Returns:
            ``[B,N,C]`` in the dtype of ``y``; dropped tokens get 0 (plus ``residual``).

        Raises:
            TypeError: a dtype that is not listed, or a ``residual`` of another dtype.
            ValueError: a shape or device that does not fit the map.

        Deterministic; differentiable in ``y`` and ``residual``, once. No host synchronisation.
        """
        _ops.check_output_side(y, self, residual)
        return _call(torch.ops.fastok.unmerge.default, y, self.assign, self.offsets, self.members, residual)

    def prune(self, x: Tensor) -> Tensor:
        """The lowest-index member of each slot of ``x[B,N,C]``: ``merge(x, mode="first")[0]``."""
        return self.merge(x, mode="first")[0]

    @overload
    def then(self, other: "TokenMap") -> "TokenMap": ...
    @overload
    def then(self, other: "SoftMap") -> "SoftMap": ...
    def then(self, other: Union["TokenMap", "SoftMap"]) -> Union["TokenMap", "SoftMap"]:
        """The map that applies this one first and ``other`` to its outputs.

        TypeError if ``other`` is no map, ValueError if it does not take what this map gives.
        """
        _ops.check_composable(self, other)
        if isinstance(other, SoftMap):
            return SoftMap.from_dense(_weighted_sums(other.dense(), self.dense()))
        slot = self.assign.long()
        if other.n_in == 0:
            assign = torch.full_like(self.assign, -1)
        else:
            assign = torch.where(slot < 0, -1, other.assign.gather(1, slot.clamp(min=0)))
        return TokenMap._trusted(assign, other.n_out, other.counts)

    @property
    def representative(self) -> Tensor:
        """int64 ``[B,M]``: the lowest-index member of each slot, -1 for an empty slot."""
        if self.n_in == 0:
            return torch.full((self.batch_size, self.n_out), -1, dtype=torch.int64, device=self.device)
        start, stop = self.offsets[:, :-1].long(), self.offsets[:, 1:]
        return torch.where(start < stop, self.members.long().gather(1, start.clamp(max=self.n_in - 1)), -1)

    @property
    def keep_mask(self) -> Tensor:
        """bool ``[B,N]``: True for each token that is in some slot, False for the dropped ones."""
        return self.assign >= 0

    def pack(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Output-side tokens without the padding of a ragged map: ``[B,M,…] -> ([total,…], cu_seqlens)``.

        Args:
            x: ``[B,M,…]``, for instance what :meth:`merge` returned (its ``size_out`` packs the same way).

        Returns:
            The first ``counts[b]`` rows of each sample, concatenated, and int32 ``cu_seqlens[B+1]`` as FlashAttention
            takes it. The total depends on the data, so on CUDA this waits for the device.
        """
        _ops.check_packable(x, self)
        used = torch.arange(self.n_out, device=self.device) < self.counts[:, None]
        return x[used], torch.nn.functional.pad(self.counts.cumsum(0), (1, 0)).int()

    def dense(self) -> Tensor:
        """fp32 ``[B,M,N]``, row-stochastic: 1/members of the slot for its members, else 0; empty slots are 0."""
        slots = torch.arange(self.n_out, device=self.device)
        hits = (self.assign[:, None] == slots[:, None]).float()
        return hits / hits.sum(-1, keepdim=True).clamp(min=1)

    def to(self, device: torch.device | str) -> "TokenMap":
        """The same map on another device."""
        return TokenMap(
            self.assign.to(device),
            self.n_out,
            self.counts.to(device),
            self.offsets.to(device),
            self.members.to(device),
        )


@dataclass(frozen=True, eq=False)
class SoftMap:
    """A batch of many-to-many maps: output token m is the weighted sum of input tokens, ``y = W x``.

    Build one with :meth:`from_dense` or :meth:`from_rows`. Rows need not sum to 1. Composed of PyTorch operations
    (there is no kernel of ours in it), so it is differentiable in ``x``, ``size`` and the weights, and as
    deterministic as those.

    A weight of exactly 0 is no connection at all, forwards and backwards: what a token holds, NaN and infinities too,
    reaches only the outputs that it has a weight for, and their gradients reach only it. Other outputs are as if it
    held 0. On the CPU this costs a look at the result where there is nothing but numbers; elsewhere, where looking
    would be a wait, two more products of the same size.

    Attributes:
        n_in: N, the number of input tokens.
        n_out: M, the number of output tokens.
    """

    _weights: Tensor | None
    _rows: tuple[Tensor, Tensor] | None
    n_in: int
    n_out: int

    @classmethod
    def from_dense(cls, weights: Tensor) -> "SoftMap":
        """``weights`` floating ``[B,M,N]``."""
        _checks.check_tensor("weights", weights)
        if not weights.is_floating_point():
            raise TypeError(f"weights must be floating-point, got {weights.dtype}")
        if weights.dim() != 3:
            raise ValueError(f"weights must be [B,M,N], got shape {tuple(weights.shape)}")
        return cls(weights, None, weights.shape[2], weights.shape[1])

    @classmethod
    def from_rows(cls, index: Tensor, weight: Tensor, n_in: int) -> "SoftMap":
        """Sparse rows: output m is the sum over j of ``weight[b,m,j] * x[b, index[b,m,j]]``.

        Args:
            index: integer ``[B,M,k]``; -1 is skipped. Values are checked as in :meth:`TokenMap.from_assign`.
            weight: floating ``[B,M,k]``.
            n_in: number of input tokens N.
        """
        _checks.check_tensor("index", index)
        _checks.check_tensor("weight", weight)
        if index.dim() != 3 or index.shape != weight.shape:
            raise ValueError(
                f"index and weight must both be [B,M,k], got shapes {tuple(index.shape)} and {tuple(weight.shape)}"
            )
        if not weight.is_floating_point():
            raise TypeError(f"weight must be floating-point, got {weight.dtype}")
        _checks.check_at_least("n_in", n_in, 0)
        _checks.check_range("index", index, -1, n_in)
        return cls(None, (index.long(), weight), n_in, index.shape[1])

    @property
    def batch_size(self) -> int:
        """B, the number of samples."""
        return self._any().shape[0]

    @property
    def device(self) -> torch.device:
        """Where the map lives."""
        return self._any().device

    def _any(self) -> Tensor:
        if self._weights is not None:
            return self._weights
        assert self._rows is not None
        return self._rows[1]

    def dense(self) -> Tensor:
        """fp32 ``[B,M,N]``: the weights W."""
        if self._weights is not None:
            return self._weights if self._weights.dtype == torch.float64 else self._weights.float()
        assert self._rows is not None
        index, weight = self._rows
        weight = torch.where(index < 0, 0, weight if weight.dtype == torch.float64 else weight.float())
        out = weight.new_zeros(index.shape[0], self.n_out, self.n_in)
        if self.n_in == 0:
            return out
        return out.scatter_add(2, index.clamp(min=0), weight)

    def merge(self, x: Tensor, *, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``y = W x``.

        Args:
            x: ``[B,N,C]``, fp32, fp16 or bf16.
            size: fp32 ``[B,N]``, how many original tokens each stands for. Rows of W are then re-weighted by it and
                scaled back to their own sum.

        Returns:
            ``y[B,M,C]`` in the dtype of ``x``, and fp32 ``size_out[B,M]``: each token's size shared out over the
            outputs in proportion to its column of W, so that sizes add up to what they were.
        """
        _ops.check_input_side(x, self, size)
        weights = self.dense()
        shares = _divide(weights, weights.sum(1, keepdim=True))
        if size is None:
            return _weighted_sums(weights, x), shares.sum(-1)
        sizes = size[:, None].masked_fill((weights == 0) & ~size[:, None].isfinite(), 0)
        weighted = weights * sizes
        weighted = _divide(weighted, weighted.sum(-1, keepdim=True)) * weights.sum(-1, keepdim=True)
        return _weighted_sums(weighted, x), (shares * sizes).sum(-1)

    def unmerge(self, y: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """``Wᵀ y`` with the columns of W normalised to sum 1; tokens in no row give 0; plus ``residual``."""
        _ops.check_output_side(y, self, residual)
        weights = self.dense()
        wide = y.to(_accumulator(y))
        out = _weighted_sums(_divide(weights, weights.sum(1, keepdim=True)).mT, wide)
        return (out if residual is None else out + residual).to(y.dtype)

    def then(self, other: Union["TokenMap", "SoftMap"]) -> "SoftMap":
        """The map that applies this one first and ``other`` to its outputs.

        TypeError if ``other`` is no map, ValueError if it does not take what this map gives.
        """
        _ops.check_composable(self, other)
        weights = self.dense()
        return SoftMap.from_dense(_weighted_sums(other.dense(), weights))

    def to(self, device: torch.device | str) -> "SoftMap":
        """The same map on another device."""
        weights = None if self._weights is None else self._weights.to(device)
        rows = None if self._rows is None else (self._rows[0].to(device), self._rows[1].to(device))
        return SoftMap(weights, rows, self.n_in, self.n_out)


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _weighted_sums(weights: Tensor, x: Tensor) -> Tensor:
    """``weights[B,M,N] @ x[B,N,C]`` in the dtype of ``x``, where a weight of 0 leaves a token out."""
    wide = _accumulator(x)
    return _WeightedSums.apply(weights.to(wide), x.to(wide)).to(x.dtype)


class _WeightedSums(torch.autograd.Function):
    """Both directions leave out what has a weight of 0."""

    @staticmethod
    def forward(weights: Tensor, x: Tensor) -> Tensor:
        with _full_precision(x):
            return _product(weights, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        weights, x = ctx.saved_tensors
        with _full_precision(grad):
            return grad @ _numbers(x).mT, _product(weights.mT, grad)


def _full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Where autocast does not round factors."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _product(weights: Tensor, x: Tensor) -> Tensor:
    if x.device.type == "cpu" and _checks.has_values(x):
        plain = weights @ x
        if bool(plain.isfinite().all()):  # what is no number would have spoilt its channel
            return plain
    # The sum of the numbers; then the infinities that reach each output, counted from above and below. NaN is both.
    high, low = ((x == limit) | x.isnan() for limit in (math.inf, -math.inf))
    sign = weights.sign()
    count = sign.abs() @ (high.to(x.dtype) + low.to(x.dtype))
    excess = sign @ (high.to(x.dtype) - low.to(x.dtype))
    total = weights @ _numbers(x)
    total = torch.where(count + excess > 0, total + math.inf, total)
    return torch.where(count - excess > 0, total - math.inf, total)


def _numbers(x: Tensor) -> Tensor:
    """``x`` with 0 for NaN and infinities."""
    return torch.where(x.isfinite(), x, 0)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """``a / b``, and 0 where ``b`` is 0."""
    return torch.where(b == 0, 0, a / torch.where(b == 0, 1, b))
