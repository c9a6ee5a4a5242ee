"""GlobalCom²: Liu et al., "Global Compression Commander: Plug-and-Play Inference Acceleration for High-Resolution Large
Vision-Language Models", AAAI 2026, arXiv 2501.05179."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..token_map import TokenMap
from .common import (
    BeforeLanguageModel,
    budget,
    check_keep,
    check_range,
    crops_of,
    grid_of,
    ranks,
    regions,
    scores_of,
    valid_of,
)
from .context import TokenContext


@dataclass(frozen=True)
class GlobalCom2(BeforeLanguageModel):
    """What the class token attends to in the thumbnail says how much each crop keeps and, together with what it attends
    to in the crop, which tokens.

    Args:
        keep: the share that a crop keeps if all are equally important: a fraction if below 1 (published: 0.25, and 0.1;
            numbers of tokens are rounded down), or a number of tokens of a crop.
        temperature: of the softmax over crops; the higher, the more equal.
        compat: take scores before the softmax over tokens, as the released code does.

    Raises:
        TypeError: an argument of another type.
        ValueError: no token kept, a ``temperature`` that is not positive; when called, ``"crops"`` that are not B
            samples.

    Needs the score ``"cls"`` (with ``compat``: ``"cls:logit"``), the class token's row, averaged over heads, in the
    last layer; and, for an image in crops, ``"crops"``, ``grid`` and ``"valid"``. Otherwise each sample is a
    thumbnail. Acts before the language model; all newline embeddings stay. Gives a ragged `TokenMap`: the thumbnail's
    tokens by falling score, as published, those of a crop in raster order. Ties go to the lowest index, NaN is chosen
    last and counts as 0 in sums; deterministic, no host synchronisation; images do not depend on each other. Not in
    ``compat``: the released code puts tokens of padded crops back at other places of their crop than they came from.
    """

    keep: float = 0.25
    temperature: float = 10.0
    compat: bool = False

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_range("temperature", self.temperature, 0)
        if self.temperature == 0:
            raise ValueError("temperature must be above 0, got 0")

    @property
    def needs(self) -> tuple[str, ...]:
        """The score, and how the image was cut."""
        return (self._score, "grid", "crops", "valid")

    @property
    def _score(self) -> str:
        return "cls:logit" if self.compat else "cls"

    def score_layers(self, n_layers: int) -> dict[str, tuple[int, ...]]:
        """The last, also where the features are those of an earlier one."""
        return {self._score: (-1,)}

    def __call__(self, ctx: TokenContext, /) -> TokenMap:
        """The choice among the tokens behind the ``ctx.protect`` first."""
        scores = scores_of(self, ctx, self._score)[:, ctx.protect :]
        batch, n = scores.shape
        rows, columns = crops_of(ctx)
        count = budget(self.keep, n, int)
        if count == n:
            return TokenMap.identity(batch, ctx.hidden.shape[1], scores.device)
        if rows * columns == 0:
            slots = ranks(scores)
            return _map(ctx, torch.where(slots < count, slots, -1), count)
        rate = self.keep if isinstance(self.keep, float) else self.keep / n
        first = ranks(scores[:1])
        kept = self._of_crops(ctx, scores, rows, columns, rate)
        slots = torch.cat([torch.where(first < count, first, -1), torch.where(kept, kept.cumsum(1) - 1, -1)])
        return _map(ctx, slots, max(count, min(int(n * 2 * rate) + 1, n)))

    def _of_crops(self, ctx: TokenContext, scores: Tensor, rows: int, columns: int, rate: float) -> Tensor:
        """bool ``[B-1,n]``: the tokens that crops keep."""
        t, h, w = grid_of(self, ctx)
        whole, crops = scores[0].nan_to_num(0), scores[1:]
        valid = valid_of(ctx)
        valid = torch.ones_like(crops, dtype=torch.bool) if valid is None else valid[1:, ctx.protect :]
        importance = torch.where(regions(t * h, w, rows, columns, scores.device), whole.double(), 0).sum(1)
        p = ((importance - importance.max()) / self.temperature).softmax(0)
        rates = (rate * (1 + p - p.mean())).clamp(max=1)
        counts = (valid.sum(1) * rates).long()
        seen = valid.view(rows, columns, t * h, w)
        resize = [_resize(seen.any(3).any(1).flatten(), t * h), _resize(seen.any(2).any(0).flatten(), w)]
        whole = resize[0] @ whole.view(t * h, w) @ resize[1].T
        whole = whole.view(rows, t * h, columns, w).transpose(1, 2).reshape(rows * columns, -1)
        combined = _scaled(crops, valid) + _scaled(whole, valid)
        return ranks(combined.masked_fill(~valid, torch.nan)) < counts[:, None]


def _resize(used: Tensor, n: int) -> Tensor:
    """fp32 ``[S,n]``: linear interpolation of n points at as many even steps as there are ``used[S]``."""
    place = (used.cumsum(0) - 0.5) * (n / used.sum()) - 0.5
    return (1 - (place.clamp(0, n - 1)[:, None] - torch.arange(n, device=used.device)).abs()).clamp(min=0)


def _scaled(scores: Tensor, valid: Tensor) -> Tensor:
    """Divided by the Euclidean length of a crop's valid scores."""
    return scores / torch.where(valid, scores.nan_to_num(0), 0).norm(dim=1, keepdim=True).clamp(min=1e-12)


def _map(ctx: TokenContext, slots: Tensor, capacity: int) -> TokenMap:
    """The protected tokens, then the others in the slots given, -1 for none."""
    protected = torch.arange(ctx.protect, device=slots.device).expand(len(slots), -1)
    assign = torch.cat([protected, torch.where(slots < 0, -1, slots + ctx.protect)], 1).int()
    return TokenMap._trusted(assign, ctx.protect + capacity, (assign >= 0).sum(1, dtype=torch.int32))
