"""HiRED: Arif et al., "HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution
Vision-Language Models", AAAI 2025, arXiv 2408.10945."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.select import top_tokens
from ..token_map import TokenMap
from .common import (
    BeforeLanguageModel,
    budget,
    check_keep,
    check_range,
    crops_of,
    grid_of,
    keep_top,
    keep_where,
    picked,
    ranks,
    regions,
    scores_of,
)
from .context import TokenContext


@dataclass(frozen=True)
class HiRED(BeforeLanguageModel):
    """A budget for the whole image, shared out over its crops by what the class token attends to early in the
    thumbnail, and spent on what it attends to late in each crop.

    Args:
        keep: how many tokens an image keeps, all crops together: a fraction if below 1 (rounded down; published: 0.2
            and 0.4), else a number.
        alpha: the share of them that the thumbnail keeps; ``1 - alpha`` of its tokens, the best by the early score, say
            how the crops share the rest.
        region: which part of the thumbnail a crop shows: ``"grid"``, the block at its place; ``"bands"``, as many
            consecutive tokens in raster order, as released. None: ``"grid"``, with ``compat`` ``"bands"``.
        compat: share out as the released code does.

    Raises:
        TypeError: an argument of another type.
        ValueError: no token kept, ``alpha`` outside [0, 1], an unknown region; when called, ``"crops"`` that are not B
            samples.

    Needs the scores ``"cls"`` and ``"cls:early"``, the class token's row, averaged over heads, in the layer that makes
    the features and in the first; and, for an image in crops, ``"crops"`` and ``grid``. Otherwise each sample is an
    image of its own (the published LLaVA-1.5 version). Acts before the language model; padding is cut off after the
    choice and newline embeddings are removed. Gives a ragged `TokenMap` in raster order. What rounding down leaves of
    the budget is not spent. Ties go to the lowest index, NaN is chosen last; deterministic, no host synchronisation;
    images do not depend on each other. Not published for encoders without a class token. Shares are in integers, where
    the released code rounds a product of floats down.
    """

    keep: float = 0.2
    alpha: float = 0.5
    region: str | None = None
    compat: bool = False

    needs: ClassVar[tuple[str, ...]] = ("cls", "cls:early", "grid", "crops")
    by_scores: ClassVar[bool] = True
    newlines: ClassVar[str] = "none"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_range("alpha", self.alpha, 0, 1)
        if self.region not in (None, "grid", "bands"):
            raise ValueError(f"region must be 'grid', 'bands' or None, got {self.region!r}")

    def score_layers(self, n_layers: int) -> dict[str, tuple[int, ...]]:
        """The first; the late score is of the layer that makes the features."""
        return {"cls:early": (0,)}

    def __call__(self, ctx: TokenContext, /) -> TokenMap:
        """The choice among the tokens behind the ``ctx.protect`` first."""
        scores = scores_of(self, ctx, "cls")
        rows, columns = crops_of(ctx)
        batch, n = scores.shape[0], scores.shape[1] - ctx.protect
        if rows * columns == 0:
            return keep_top(ctx, scores, budget(self.keep, n, int))
        late, early = (x[:, ctx.protect :] for x in (scores, scores_of(self, ctx, "cls:early")))
        total = budget(self.keep, batch * n, int)
        if total == batch * n:
            return TokenMap.identity(batch, ctx.hidden.shape[1], late.device)
        full = min(int(total * self.alpha), n)
        sub = min(total - full, (batch - 1) * n)
        looked_at = picked(top_tokens(early[:1], int(n * (1 - self.alpha))), n)
        hits = (self._regions(ctx, rows, columns) & looked_at).sum(1)
        shares = (hits * sub // hits.sum().clamp(min=1)).clamp(max=n)
        counts = torch.cat([shares.new_full((1,), full), shares])
        return keep_where(ctx, ranks(late) < counts[:, None], min(max(full, sub), n))

    def _regions(self, ctx: TokenContext, rows: int, columns: int) -> Tensor:
        t, h, w = grid_of(self, ctx)
        if self.region == "bands" or (self.region is None and self.compat):
            return regions(t * h * w, 1, rows * columns, 1, ctx.hidden.device)
        return regions(t * h, w, rows, columns, ctx.hidden.device)
