"""A batch of prompts in which images take fewer places than before: which columns stay, padding, positions, labels."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""The label of a place that does not count in the loss."""


@dataclass(eq=False)
class Span:
    """One image in one prompt.

    Attributes:
        row: index of the prompt.
        start: the column of its first placeholder.
        length: number of placeholders, which are contiguous.
        features: ``[m,C]``, what takes their place.
        source: int64 ``[m]``, within [0, length): the placeholder that each of these stands for.
    """

    row: int
    start: int
    length: int
    features: Tensor
    source: Tensor


@dataclass(eq=False)
class Layout:
    """Prompts ``[B,S]`` rearranged to ``[B,L]``.

    Attributes:
        column: int64 ``[B,L]``, the column that each place stands for; -1 for padding that was added.
        ordinal: int64 ``[B,L]``, the column whose position it takes when positions stay without gaps, before
        shift: int64 ``[B,L]``, the number of places removed in front of it, is taken off.
        removed: int64 ``[B]``, how many places each prompt lost.
        lengths: for each prompt, places without padding.
        rows, places: int64 ``[total]``, where the spans' features go.
        padded: whether padding was added anywhere.
    """

    column: Tensor
    ordinal: Tensor
    shift: Tensor
    removed: Tensor
    lengths: list[int]
    rows: Tensor
    places: Tensor
    padded: bool

    def gather(self, x: Tensor, fill: float) -> Tensor:
        """``x[…,B,S] -> […,B,L]``, with ``fill`` for added padding."""
        column = self.column.expand(*x.shape[:-2], *self.column.shape)
        return x.gather(-1, column.clamp(min=0)).masked_fill(column < 0, fill)

    def embeddings(self, x: Tensor, spans: list[Span]) -> Tensor:
        """``[B,L,C]``: of ``x[B,S,C]`` the columns that stay, and the spans' features; 0 for added padding."""
        out = x.gather(1, self.column.clamp(min=0)[..., None].expand(-1, -1, x.shape[-1]))
        if self.padded:
            out = out.masked_fill((self.column < 0)[..., None], 0)
        if not spans:
            return out
        return out.index_put((self.rows, self.places), torch.cat([span.features for span in spans]).to(out))

    def mask(self, mask: Tensor | None) -> Tensor | None:
        """``[B,S] -> [B,L]``; None if there is still nothing to mask."""
        if mask is not None:
            return self.gather(mask, 0)
        return (self.column >= 0).long() if self.padded else None

    def compact(self, positions: Tensor) -> Tensor:
        """``[B,S] -> [B,L]``: positions that go on without a gap where places were removed.

        Where positions start anew, as they do for several sequences in one row, removals before that do not count.
        """
        old = positions.gather(1, self.ordinal)
        anew = torch.zeros_like(self.shift)
        anew[:, 1:] = torch.where(old[:, 1:] <= old[:, :-1], self.shift[:, 1:], 0)
        return (old - (self.shift - anew.cummax(1).values)).masked_fill(self.column < 0, 0)

    def labels(self, labels: Tensor) -> Tensor:
        """``[B,S] -> [B,L]``. Column 0, which nothing predicts, gets none: padding may come to stand before it."""
        first = labels.new_full((len(labels), 1), IGNORED)
        return self.gather(torch.cat([first, labels[:, 1:]], 1), IGNORED)


def padding(mask: Tensor | None, rows: int) -> tuple[str, list[int]]:
    """The side on which prompts are padded, and how many columns of each.

    Args:
        mask: ``[B,S]``, 0 for padding, or None.
        rows: B.

    Returns:
        ``"left"`` where there is no padding: generation goes on from the last column.
    """
    if mask is None or mask.shape[1] == 0:
        return "left", [0] * rows
    visible = mask.bool()
    none_before = (~visible).int().cumprod(1).sum(1)
    none_behind = (~visible).int().flip(1).cumprod(1).sum(1)
    left, right = torch.stack([none_before, none_behind]).tolist()
    return ("right", right) if any(right) and not any(left) else ("left", left)


def rearrange(width: int, rows: int, spans: list[Span], mask: Tensor | None, device: torch.device) -> Layout:
    """Where everything goes once each span has the length of its features.

    Args:
        width: S, columns of the prompts.
        rows: B, the number of prompts.
        spans: by row and start.
        mask: ``[B,S]``, 0 for padding, or None. Prompts are padded again to the length of the longest, on the side
            where they were padded; padding that all of them have is kept.
        device: of the result.

    What is in a span follows the order of its features. Places do not depend on the other prompts but for padding.
    """
    side, padded = padding(mask, rows)
    by_row: list[list[Span]] = [[] for _ in range(rows)]
    for span in spans:
        by_row[span.row].append(span)
    removed = [sum(span.length - len(span.source) for span in own) for own in by_row]
    lengths = [width - pad - gone for pad, gone in zip(padded, removed, strict=True)]
    total = max(lengths, default=0) + min(padded, default=0)

    def numbers(start: int, stop: int) -> Tensor:
        return torch.arange(start, stop, device=device)

    columns, ordinals, shifts, at_rows, places, added = [], [], [], [], [], False
    for row, own in enumerate(by_row):
        begin, end = (padded[row], width) if side == "left" else (0, width - padded[row])
        lacking = total - lengths[row]  # columns of padding; those that were there before are used first
        known = min(lacking, padded[row])
        added = added or known < lacking
        fill = torch.full((lacking - known,), -1, device=device)
        before, behind = ([fill, numbers(begin - known, begin)], []) if side == "left" else ([], [fill])
        if side == "right":
            behind.insert(0, numbers(end, end + known))
        column, ordinal, shift, gone, at = [*before], [x.clamp(min=0) for x in before], [], 0, begin
        shift.append(torch.zeros(sum(map(len, before)), dtype=torch.int64, device=device))
        for span in own:
            count = len(span.source)
            places.append(numbers(0, count) + sum(map(len, column)) + span.start - at)
            at_rows.append(torch.full((count,), row, device=device))
            column += [numbers(at, span.start), span.source + span.start]
            ordinal += [numbers(at, span.start), numbers(span.start, span.start + count)]
            shift.append(torch.full((span.start - at + count,), gone, device=device))
            gone += span.length - count
            at = span.start + span.length
        column += [numbers(at, end), *behind]
        ordinal += [numbers(at, end), *(x.clamp(min=0) for x in behind)]
        shift.append(torch.full((end - at + sum(map(len, behind)),), gone, device=device))
        columns.append(torch.cat(column))
        ordinals.append(torch.cat(ordinal))
        shifts.append(torch.cat(shift))
    empty = torch.empty(0, dtype=torch.int64, device=device)
    return Layout(
        torch.stack(columns),
        torch.stack(ordinals),
        torch.stack(shifts),
        torch.tensor(removed, device=device),
        lengths,
        torch.cat([empty, *at_rows]),
        torch.cat([empty, *places]),
        added,
    )


@dataclass(eq=False)
class History:
    """What a cache holds of prompts that were shortened, kept as the cache's attribute ``_fastok``.

    Attributes:
        columns: how many columns of the original prompts it stands for. Later ones are one place each.
        places: how many places of the cache these take.
        mask: ``[B,places]``, 0 for padding, or None if there is none.
        removed: int64 ``[B]``, how many places each prompt lost.
    """

    columns: int
    places: int
    mask: Tensor | None
    removed: Tensor

    def note_on(self, past_key_values: Any) -> None:
        """From now on, the cache holds this; what is done to its rows is done to those here."""
        past_key_values._fastok = self
        if not (isinstance(past_key_values, _Following) or torch.compiler.is_compiling()):
            kind: Any = type(past_key_values)
            past_key_values.__class__ = _following(kind)

    def selected(self, rows: Tensor) -> "History":
        """Of these rows."""
        mask = None if self.mask is None else self.mask[rows.to(self.mask.device)]
        return replace(self, mask=mask, removed=self.removed[rows.to(self.removed.device)])

    @classmethod
    def none(cls, batch: int) -> "History":
        """Of a cache of prompts as they were."""
        return cls(0, 0, None, torch.zeros(batch, dtype=torch.int64))

    def seen(self, cached: int) -> int:
        """The number of original columns that ``cached`` places stand for."""
        if cached < self.places:
            raise NotImplementedError(
                f"past_key_values: required, a cache cropped to {cached} tokens; supported, at least the {self.places} "
                "of the last prompt that had images removed from it"
            )
        return self.columns + cached - self.places

    def rows(self, batch: int) -> "History":
        """For ``batch`` rows, each of the present ones repeated as a cache repeats them."""
        repeats, rest = divmod(batch, len(self.removed))
        if rest:
            raise ValueError(f"past_key_values is of {len(self.removed)} prompts, which {batch} cannot continue")
        mask = None if self.mask is None else self.mask.repeat_interleave(repeats, 0)
        return History(self.columns, self.places, mask, self.removed.repeat_interleave(repeats))

    def past_mask(self, mask: Tensor | None, cached: int, batch: int) -> Tensor | None:
        """``[B,cached]`` from the mask ``[B,columns + …]`` of the original tokens; None if all are to be seen."""
        later = cached - self.places
        if mask is None and self.mask is None:
            return None
        like = self.mask if mask is None else mask
        assert like is not None
        first = like.new_ones(batch, self.places) if self.mask is None else self.mask.to(like)
        since = like.new_ones(batch, later) if mask is None else mask[:, self.columns : self.columns + later]
        return torch.cat([first, since], 1)


class _Following:
    """A cache whose `History` follows its rows."""

    _fastok: History | None


@cache
def _following(base: Any) -> Any:
    """A subclass of a cache's class ``base`` that passes for it."""

    class Followed(base, _Following):  # type: ignore[misc]
        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            self._follow(beam_idx)

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self._follow(indices)

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            if self._fastok is not None:
                self._fastok = self._fastok.rows(repeats * len(self._fastok.removed))

        def reset(self) -> None:
            super().reset()
            self._fastok = None

        def __reduce_ex__(self, protocol: Any) -> Any:
            return _follower, (base,), self.__getstate__()

        def _follow(self, rows: Tensor) -> None:
            if self._fastok is not None:
                self._fastok = self._fastok.selected(rows)

    Followed.__module__, Followed.__name__, Followed.__qualname__ = base.__module__, base.__name__, base.__qualname__
    return Followed


def _follower(base: Any) -> Any:
    """An empty one, for pickles and copies."""
    kind = _following(base)
    return kind.__new__(kind)
