"""One image or video between the vision tower and the language model: what a reducer is shown, and what comes of it."""

from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

from ..reducers.context import Reducer, TokenContext
from ..token_map import SoftMap, TokenMap

NEWLINES = ("all", "filled", "none")


@dataclass(eq=False)
class Visual:
    """One image or video.

    Attributes:
        hidden: ``[B,N,C]``, the tokens of its B crops (or frames), each in raster order, before they are packed.
        grid: ``(t, h, w)`` of one crop.
        scores, keys, values, extra: as in `TokenContext`, ``[B,N,…]``.
        packed: int64 ``[n]``, the token ``b * N + i`` that stands at each place of the n features in the prompt, -1 for
            a newline; None if there is one crop and nothing but its tokens.
        ordered: the number of leading crops that stay together when packed, so that their tokens can be in any order.
        seconds: its share of what the vision tower's scores took.
        merged: where tokens were reduced before the projector, their map, and ``[B,M,C]``, what is left.
    """

    hidden: Tensor
    grid: tuple[int, int, int] | None = None
    scores: dict[str, Tensor] = field(default_factory=dict)
    keys: Tensor | None = None
    values: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)
    packed: Tensor | None = None
    ordered: int = 1
    seconds: float = 0.0
    merged: tuple[TokenMap | SoftMap, Tensor] | None = None

    def context(self, text: Tensor | None, whole: bool) -> TokenContext:
        """What a reducer is shown: a row for each crop, or (``whole``) one for all of them."""

        def shown(x: Tensor) -> Tensor:
            return x.flatten(0, 1)[None] if whole else x

        return TokenContext(
            shown(self.hidden),
            keys=None if self.keys is None else shown(self.keys),
            values=None if self.values is None else shown(self.values),
            scores={name: shown(scores) for name, scores in self.scores.items()},
            grid=None if whole else self.grid,
            text=text,
            extra={name: shown(x) if name in ("vision", "valid") else x for name, x in self.extra.items()},
        )


@dataclass(eq=False)
class Reduced:
    """What a reducer left of a `Visual`.

    Attributes:
        features: ``[m,C]``, for the prompt.
        source: int64 ``[m]``, the place among the original features that each of these stands for.
        token_map: what the reducer returned.
        slot: int64 ``[m]``, the output ``b * M + j`` of the map that stands at each place, -1 for a newline.
        pictures: int64 ``[h,w]`` each, the tokens of the image as they lie in it: see `pictures`.
        seconds: what this took.
    """

    features: Tensor
    source: Tensor
    token_map: TokenMap | SoftMap
    slot: Tensor
    pictures: list[Tensor]
    seconds: float

    @property
    def patches(self) -> list[Tensor]:
        """int64 ``[h,w]`` for each picture: the place in ``features`` of what each token went into, -1 if nowhere."""
        places = torch.arange(len(self.slot), device=self.slot.device)
        outputs = self.token_map.batch_size * self.token_map.n_out
        place = places.new_full((outputs + 1,), -1)
        place = place.scatter(0, torch.where(self.slot < 0, outputs, self.slot), places)
        place[outputs] = -1
        into = _into(self.token_map)
        return [place[torch.where(into[picture] < 0, outputs, into[picture])] for picture in self.pictures]


def reduce(features: Tensor, visual: Visual, reducer: Reducer, text: Tensor | None) -> Reduced:
    """Apply ``reducer`` to one image, unless it was reduced before the projector, and lay out what is left.

    ``features[n,C]`` are those that the model would put into the prompt.

    A reducer that has ``whole_image = True`` is shown all crops as one row. What has been merged stands where its first
    member stood that is in the prompt at all (for a `SoftMap`: the one with the largest weight); in crops that stay
    together, in the order of the reducer's output (in raster order if that was done before the projector). Newline
    embeddings behind the rows of a stitched image all stay; with the reducer's attribute ``newlines = "filled"``, those
    of rows in which something is left; with ``"none"``, none.
    """
    started = perf_counter()
    whole: bool = getattr(reducer, "whole_image", False)
    token_map, merged = merged_by(visual, reducer, text, whole) if visual.merged is None else visual.merged
    batch, n = token_map.batch_size, token_map.n_in
    total = len(features)
    place = _places(visual, total).view(batch, n)
    at = _places_of_slots(token_map, place, total)
    key = at
    if visual.merged is None and (visual.packed is None or not whole):
        crop = torch.arange(batch, device=at.device)[:, None]
        slot = torch.arange(token_map.n_out, device=at.device)
        key = torch.where((at < total) & (crop < visual.ordered), crop * n + slot, at)
    at, key = at.flatten(), key.flatten()
    left = (at < total).nonzero()[:, 0]
    kept, source, key = merged.flatten(0, 1)[left], at[left], key[left]
    order, slot = key.sort(stable=True).indices, left
    if visual.packed is not None:
        newlines = _newlines(visual, source, getattr(reducer, "newlines", "all"))
        kept = torch.cat([kept, features[newlines].to(kept)])
        source, key = torch.cat([source, newlines]), torch.cat([key, newlines])
        slot = torch.cat([slot, torch.full_like(newlines, -1)])
        order = key.sort(stable=True).indices
    seconds = perf_counter() - started
    return Reduced(kept[order], source[order], token_map, slot[order], pictures(visual), seconds)


def pictures(visual: Visual) -> list[Tensor]:
    """int64 ``[h,w]`` each: which token ``b * N + i`` shows which part of the image, or of a frame of the video.

    A thumbnail and the map stitched of its crops are two pictures; each frame is one. Where the crops have no known
    grid, their tokens are one row.
    """
    batch, n = visual.hidden.shape[:2]
    t, h, w = (1, 1, n) if visual.grid is None else visual.grid
    numbers = torch.arange(batch * n, device=visual.hidden.device)
    if visual.packed is None or visual.ordered == batch:
        return list(numbers.view(batch * t, h, w))
    stitched = visual.packed[visual.ordered * n :]
    rows = int((stitched < 0).sum())
    whole = list(numbers[: visual.ordered * n].view(visual.ordered * t, h, w))
    return [*whole, stitched.view(rows, -1)[:, :-1]]  # a newline ends each row


def _into(token_map: TokenMap | SoftMap) -> Tensor:
    """int64 ``[B * N]``: the output ``b * M + j`` that each token went into (where it weighs most), -1 if in none."""
    if isinstance(token_map, TokenMap):
        slot = token_map.assign.long()
    else:
        weights = token_map.dense().abs()
        slot = torch.where(weights.amax(1) > 0, weights.argmax(1), -1)
    first = torch.arange(len(slot), device=slot.device)[:, None] * token_map.n_out
    return torch.where(slot < 0, -1, slot + first).flatten()


def merged_by(visual: Visual, reducer: Reducer, text: Tensor | None, whole: bool) -> tuple[TokenMap | SoftMap, Tensor]:
    """What the reducer returns, and the tokens merged by it."""
    name, ctx = type(reducer).__name__, visual.context(text, whole)
    token_map = reducer(ctx)
    if not isinstance(token_map, (TokenMap, SoftMap)):
        raise TypeError(f"{name} must return a TokenMap or a SoftMap, got {type(token_map).__name__}")
    batch, n = ctx.hidden.shape[:2]
    if (token_map.batch_size, token_map.n_in) != (batch, n) or token_map.n_out > n:
        raise ValueError(
            f"{name} must return a map of {batch} samples from {n} tokens to no more, got {token_map.batch_size} "
            f"samples from {token_map.n_in} to {token_map.n_out}"
        )
    return token_map, token_map.merge(ctx.hidden)[0]


def _places(visual: Visual, total: int) -> Tensor:
    """int64 ``[B * N]``: where each token stands among the features; ``total`` if nowhere."""
    tokens = visual.hidden.shape[0] * visual.hidden.shape[1]
    numbers = torch.arange(total, device=visual.hidden.device)
    if visual.packed is None:
        return numbers
    place = numbers.new_full((tokens + 1,), total)
    return place.scatter(0, torch.where(visual.packed < 0, tokens, visual.packed), numbers)[:tokens]


def _places_of_slots(token_map: TokenMap | SoftMap, place: Tensor, total: int) -> Tensor:
    """int64 ``[B,M]``: where each output token goes; ``total`` if nowhere."""
    batch, n = place.shape
    if n == 0:
        return place.new_full((batch, token_map.n_out), total)
    if isinstance(token_map, TokenMap):
        slot = torch.where(token_map.assign < 0, token_map.n_out, token_map.assign).long()
        at = place.new_full((batch, token_map.n_out + 1), total)
        return at.scatter_reduce(1, slot, place, "amin")[:, : token_map.n_out]
    weights = token_map.dense()
    counts = (weights != 0) & (place < total)[:, None]
    weights = torch.where(counts, weights, -torch.inf)
    best = (weights == weights.amax(-1, keepdim=True)) & counts
    first = torch.where(best, torch.arange(n, device=place.device), n).amin(-1)
    return torch.where(first < n, place.gather(1, first.clamp(max=n - 1)), total)


def _newlines(visual: Visual, source: Tensor, rule: str) -> Tensor:
    """int64, the places of the newlines that stay with the tokens from ``source``."""
    if rule not in NEWLINES:
        raise ValueError(f"newlines must be one of {', '.join(map(repr, NEWLINES))}; got {rule!r}")
    assert visual.packed is not None
    is_newline = visual.packed < 0
    newlines = is_newline.nonzero()[:, 0]
    if rule == "all":
        return newlines
    if rule == "none":
        return newlines[:0]
    row = is_newline.long().cumsum(0) - is_newline.long()
    stitched = source[visual.packed[source] >= visual.ordered * visual.hidden.shape[1]]
    filled = torch.zeros(len(row) + 1, dtype=torch.bool, device=row.device)
    if visual.hidden.shape[0] == visual.ordered:  # one newline, behind everything
        stitched = source
    return newlines[filled.index_fill(0, row[stitched], True)[row[newlines]]]
