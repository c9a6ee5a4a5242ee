"""Where everything is in a packed page: the byte layout of docs/kv-format.md as arithmetic on ints or on tensors.

A format travels through the ops as a list of ints (:func:`Layout.of`); ``fastok.KVFormat`` is its public face.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 16
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CHANNEL, TOKEN = 0, 1  # axes
CHANNEL_SCALE, COMPAT = 1, 2  # flags
# Bits are hundredths here: 158 stands for a trit.
TRIT = 158
SIGN_MIXES = (150, 125, 100)


def aligned(size: Any) -> Any:
    """``size`` rounded up to a multiple of 16."""
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def code_bytes(bits: int, channels: int) -> int:
    """Bytes of a row of ``channels`` codes."""
    return -(-channels // 5) if bits == TRIT else -(-channels * bits // 800)


@dataclass(frozen=True)
class Part:
    """Some channels of a row that share a code: ``kind`` is ``"affine"``, ``"trit"`` or ``"sign"``."""

    kind: str
    bits: int
    channels: int
    fourier: bool = False

    @property
    def arrays(self) -> int:
        """How many parameters a group has."""
        return 2 if self.kind == "affine" else 1


@dataclass(frozen=True)
class Array:
    """Parameters of a part: ``width`` numbers a row. ``high``: of that class of tokens only (None: of both)."""

    part: Part
    width: int
    high: bool | None


@dataclass(frozen=True)
class Side:
    """The keys' or the values' half of a format, for heads of ``width`` channels."""

    bits: int
    axis: int
    flags: int
    low_bits: int  # of the low class, 0: no classes
    width: int
    group: int
    scale_bytes: int

    @property
    def compat(self) -> bool:
        """Numerics as released."""
        return bool(self.flags & COMPAT)

    @property
    def channel_scale(self) -> bool:
        """Rows are divided by one factor per channel first."""
        return bool(self.flags & CHANNEL_SCALE)

    @property
    def hard(self) -> int:
        """Channels of a mixed code that have two bits."""
        return self.width * (self.bits - 100) // 100 if self.bits in SIGN_MIXES else 0

    @property
    def needs_channels(self) -> bool:
        """Whether ``channels[B,G,D]`` says something about this side."""
        return self.channel_scale or self.hard > 0

    @property
    def parts(self) -> tuple[Part, ...]:
        """In the order of the codes of a row."""
        if self.bits in SIGN_MIXES:
            easy = self.width - self.hard
            fourier = easy >= 2 and easy & (easy - 1) == 0
            hard = (Part("affine", 200, self.hard),) if self.hard else ()
            return (Part("sign", 100, easy, fourier), *hard)
        return (Part("trit" if self.bits == TRIT else "affine", self.bits, self.width),)

    @property
    def low(self) -> Part | None:
        """What tokens of the low class have instead; None: they are coded as the high ones."""
        if not self.low_bits:
            return None
        return Part("trit" if self.low_bits == TRIT else "affine", self.low_bits, self.width)

    @property
    def own_arrays(self) -> bool:
        """Whether the low class has parameters of its own, and not the high one's."""
        return self.low_bits == TRIT

    @property
    def shares_ranges(self) -> bool:
        """Whether classes share the ranges of channels, which are stored in place of scales."""
        return self.axis == CHANNEL and self.low_bits > 0 and not self.own_arrays

    def row_bytes(self, high: bool = True) -> int:
        """Bytes of one token's codes."""
        parts = self.parts if high or self.low is None else (self.low,)
        return sum(code_bytes(part.bits, part.channels) for part in parts)

    def groups_of(self, part: Part) -> int:
        """Entries of one row of a parameter array."""
        return part.channels if self.axis == CHANNEL else -(-part.channels // self.group)

    @property
    def arrays(self) -> tuple[Array, ...]:
        """One after the other."""
        if self.low is None or not self.own_arrays:
            classes: list[tuple[bool | None, tuple[Part, ...]]] = [(None, self.parts)]
        else:
            classes = [(True, self.parts), (False, (self.low,))]
        return tuple(Array(part, self.groups_of(part), high) for high, parts in classes for part in parts
                     for _ in range(part.arrays))  # fmt: skip

    def array_rows(self, array: Array, high: Any, low: Any, token_groups: Any) -> Any:
        """How many rows an array has in a page with so many tokens of each class; counts are ints or tensors."""
        if self.axis != CHANNEL:
            return high + low
        if array.high is None:
            return token_groups
        return ((high if array.high else low) > 0) * 1

    def codes_size(self, high: Any, low: Any) -> Any:
        """Bytes of the codes of a page with so many tokens of each class, aligned."""
        return aligned(high * self.row_bytes() + low * self.row_bytes(False))

    def size(self, high: Any, low: Any, token_groups: Any) -> Any:
        """Bytes of codes and parameters, aligned."""
        rows = [self.array_rows(array, high, low, token_groups) * array.width for array in self.arrays]
        return self.codes_size(high, low) + aligned(sum(rows) * self.scale_bytes)


@dataclass(frozen=True)
class Layout:
    """A format for heads of a given width."""

    key: Side
    value: Side
    group: int
    page: int
    scale_dtype: torch.dtype

    @classmethod
    def of(cls, fmt: list[int], width: int) -> "Layout":
        """From the ints ``[bits, axis, flags, low bits]`` of keys, the same of values, ``[group, page, scale]``.

        Numbers of bits are times a hundred.
        """
        *codes, group, page, scale = fmt
        dtype = SCALE_DTYPES[scale]
        key, value = (
            Side(bits, axis, flags, low, width, group, dtype.itemsize)
            for bits, axis, flags, low in (codes[:4], codes[4:])
        )
        return cls(key, value, group, page, dtype)

    @property
    def two_classes(self) -> bool:
        """Whether tokens are of a high or a low class."""
        return self.key.low_bits > 0 or self.value.low_bits > 0

    @property
    def token_groups(self) -> int:
        """Groups of tokens per page that the directory counts."""
        return self.page // self.group if CHANNEL in (self.key.axis, self.value.axis) else 1

    def sizes(self, high: Any, low: Any, token_groups: Any) -> tuple[Any, Any]:
        """Bytes of the key half and of the value half of a record."""
        return self.key.size(high, low, token_groups), self.value.size(high, low, token_groups)

    def full_record(self, high: bool = True) -> int:
        """Bytes of a page of tokens of one class."""
        return sum(self.sizes(self.page if high else 0, 0 if high else self.page, self.token_groups))

    def largest_record(self) -> int:
        """Bytes that a page may take."""
        return max(self.full_record(), sum(self.sizes(self.page - 1, 1, self.token_groups)))


def unpack_bits(bits: Tensor, count: int) -> Tensor:
    """``bits`` uint8 ``[…,n]`` as bool ``[…,count]``, lowest bit first."""
    places = torch.arange(count, device=bits.device)
    return (bits[..., places // 8] >> (places % 8).to(torch.uint8)) & 1 > 0


def pack_bits(flags: Tensor) -> Tensor:
    """Bool ``[…,count]`` as uint8 ``[…,ceil(count/8)]``, lowest bit first."""
    padded = torch.nn.functional.pad(flags.to(torch.uint8), (0, -flags.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (padded << torch.arange(8, dtype=torch.uint8, device=flags.device)).sum(-1, dtype=torch.uint8)


@dataclass(frozen=True)
class Addresses:
    """Of every entry (token) of some pages: whether it exists, and where its codes and parameters begin in ``data``.

    Shapes are those of ``offset`` plus ``[P]`` for entries. An entry uses the arrays of its class only.
    """

    layout: Layout
    valid: Tensor
    high: Tensor | None  # of the entry's class, two classes only
    codes: tuple[Tensor, Tensor]  # of the keys and of the values
    arrays: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]  # per parameter array, the row of the entry
    size: Tensor  # of the record

    @classmethod
    def of(cls, layout: Layout, offset: Tensor, counts: Tensor, classes: Tensor | None) -> "Addresses":
        """Of pages at ``offset`` with ``counts[…,token_groups]`` entries of which ``classes[…,bytes]`` are high."""
        entry = torch.arange(layout.page, device=offset.device)
        counts = counts.long()
        n = counts.sum(-1, keepdim=True)
        valid = entry < n
        rank, n_high, high = entry.expand(valid.shape), n, None
        if classes is not None:
            high = unpack_bits(classes, layout.page) & valid
            n_high = high.sum(-1, keepdim=True)
            rank = torch.where(high, high.cumsum(-1) - 1, n_high + (~high).cumsum(-1) - 1)
        slots = (counts > 0).cumsum(-1) - 1  # of a token group among those that have entries
        group = (entry[:, None] >= counts.cumsum(-1)[..., None, :]).sum(-1).clamp(max=counts.shape[-1] - 1)
        slot = slots.gather(-1, group).clamp(min=0)
        filled = (counts > 0).sum(-1, keepdim=True)
        codes, arrays, start = [], [], offset[..., None]
        for side in (layout.key, layout.value):
            at = rank * side.row_bytes()
            if high is not None:
                low_at = n_high * side.row_bytes() + (rank - n_high) * side.row_bytes(False)
                at = torch.where(high, at, low_at)
            codes.append(start + at)
            place = start + side.codes_size(n_high, n - n_high)
            of_side = []
            for array in side.arrays:
                row_bytes, row = array.width * side.scale_bytes, slot if side.axis == CHANNEL else rank
                of_side.append(place + row * row_bytes)
                place = place + side.array_rows(array, n_high, n - n_high, filled) * row_bytes
            arrays.append(tuple(of_side))
            start = start + side.size(n_high, n - n_high, filled)
        size = torch.where(n > 0, start - offset[..., None], 0)[..., 0]
        return cls(layout, valid, high, (codes[0], codes[1]), (arrays[0], arrays[1]), size)
