"""FoPru: Jiang et al., "FoPru: Focal Pruning for Efficient Large Vision-Language Models", arXiv 2411.14164."""

from dataclasses import dataclass
from typing import ClassVar

from ..ops.select import top_tokens
from ..token_map import TokenMap
from .common import BeforeLanguageModel, budget, check_keep, grid_of, keep_top, keep_where, picked, scores_of
from .context import TokenContext

STRATEGIES = ("rank", "row")


@dataclass(frozen=True)
class FoPru(BeforeLanguageModel):
    """Keep the tokens that receive most attention in the vision encoder, one by one or whole rows of the image.

    Args:
        keep: how many tokens each crop keeps: a fraction if below 1 (of N, rounded down; published: 0.25), else a
            number.
        strategy: ``"rank"``, the highest scores; or ``"row"``, the rows with the highest sums, as many whole rows as
            fit into ``keep``.

    Raises:
        TypeError: ``keep`` of another type.
        ValueError: no token kept, an unknown strategy; when called, a ``keep`` that is less than one row.

    Needs the score ``"column"``: what each token receives, averaged over heads and queries, in the layer that makes the
    features; ``"row"`` also needs ``grid`` (rows of all frames are compared). Acts before the language model, on each
    crop alone. Gives a `TokenMap` in raster order; the identity where ``keep`` reaches N. Ties go to the lowest index,
    NaN is chosen last (a row that holds one is); deterministic, no host synchronisation, and samples do not depend on
    their batch. No code was released and the paper leaves open which attention counts, how fractions are rounded and
    what becomes of an incomplete row: attention of all queries, down, and nothing are assumed.
    """

    keep: float = 0.25
    strategy: str = "rank"

    by_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {', '.join(map(repr, STRATEGIES))}; got {self.strategy!r}")

    @property
    def needs(self) -> tuple[str, ...]:
        """The score, and the grid that has the rows."""
        return ("column", "grid") if self.strategy == "row" else ("column",)

    def __call__(self, ctx: TokenContext, /) -> TokenMap:
        """The best by ``ctx.scores["column"]``, besides the ``ctx.protect`` first."""
        scores = scores_of(self, ctx, "column")
        batch, n = scores.shape
        candidates = n - ctx.protect
        count = budget(self.keep, candidates, int)
        if self.strategy == "rank":
            return keep_top(ctx, scores, count)
        t, h, w = grid_of(self, ctx)
        if count >= candidates:
            return TokenMap.identity(batch, n, scores.device)
        if count < w:
            raise ValueError(f"keep must be at least one row of {w} tokens, got {self.keep}, which is {count}")
        rows = top_tokens(scores[:, ctx.protect :].unflatten(1, (t * h, w)).sum(-1), count // w)
        mask = picked(rows, t * h)[..., None].expand(-1, -1, w).flatten(1)
        return keep_where(ctx, mask, count // w * w)
