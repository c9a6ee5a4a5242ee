"""VTC-CLS: Wang et al., "[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs", arXiv 2412.05819."""

from dataclasses import dataclass
from typing import ClassVar

from ..ops.checks import check_int
from ..token_map import TokenMap
from .common import BeforeLanguageModel, budget, check_keep, check_range, keep_top, scores_of
from .context import TokenContext


@dataclass(frozen=True)
class VTCCLS(BeforeLanguageModel):
    """Keep the tokens that the class token attends to most, summed over the later layers of the vision encoder.

    Args:
        keep: how many tokens to keep: a number (published: 64, 128, 256 of 576), or a fraction if below 1 (of N,
            rounded to the nearest, which the paper leaves open).
        start: the first layer that counts, an index, or a fraction of the encoder's depth if a float. The last layer
            does not count: of 24, layers ``start`` to 22. Published per data set only; by default the later half.

    Raises:
        TypeError: an argument of another type.
        ValueError: no token kept, a negative ``start``, or (in `score_layers`) one that leaves no layer.

    Needs the score ``"cls"``: the class token's row of attention, averaged over heads and summed over the layers that
    `score_layers` names; of encoders without a class token the mean over all rows. Acts before the language model.
    Gives a `TokenMap` of ``keep`` tokens in raster order; all of them where there are no more. Ties go to the lowest
    index, NaN is chosen last; deterministic, no host synchronisation, and samples do not depend on their batch.
    """

    keep: float = 128
    start: float = 0.5

    needs: ClassVar[tuple[str, ...]] = ("cls",)
    by_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if isinstance(self.start, float):
            check_range("start", self.start, 0, 1)
        else:
            check_int("start", self.start)
            check_range("start", self.start, 0)

    def score_layers(self, n_layers: int) -> dict[str, tuple[int, ...]]:
        """From ``start`` to the last but one."""
        first = int(self.start * n_layers) if isinstance(self.start, float) else self.start
        last = max(n_layers - 1, 1)
        if first >= last:
            raise ValueError(f"start must be within [0, {last}) for an encoder of {n_layers} layers, got {self.start}")
        return {"cls": tuple(range(first, last))}

    def __call__(self, ctx: TokenContext, /) -> TokenMap:
        """The best by ``ctx.scores["cls"]``, besides the ``ctx.protect`` first."""
        scores = scores_of(self, ctx, "cls")
        return keep_top(ctx, scores, budget(self.keep, scores.shape[1] - ctx.protect, round))
