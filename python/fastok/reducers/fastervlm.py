"""FasterVLM: Zhang et al., "[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference
Faster", arXiv 2412.01818v1."""

from dataclasses import dataclass
from typing import ClassVar

from ..token_map import TokenMap
from .common import BeforeLanguageModel, budget, check_keep, keep_top, scores_of
from .context import TokenContext


@dataclass(frozen=True)
class FasterVLM(BeforeLanguageModel):
    """Keep the tokens that the vision encoder's class token attends to most.

    Args:
        keep: how many tokens each crop keeps: a fraction if below 1 (of N, rounded to the nearest; the published rates
            are 0.5, 0.25, 0.1 and 0.05 of 576), else a number.

    Raises:
        TypeError: ``keep`` of another type. ValueError: no token kept.

    Needs the score ``"cls"``: the class token's row of attention in the layer that makes the features, averaged over
    heads; of encoders without a class token the mean over all rows, as the authors advise. Acts before the language
    model, on each crop alone; padding is cut off after the choice, and every newline embedding stays. Gives a
    `TokenMap` of ``keep`` tokens in raster order; all of them where there are no more. Ties go to the lowest index, NaN
    is chosen last; deterministic, no host synchronisation, and samples do not depend on their batch. Differs from the
    released code in that scores are compared in fp32.
    """

    keep: float = 0.25

    needs: ClassVar[tuple[str, ...]] = ("cls",)
    by_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def __call__(self, ctx: TokenContext, /) -> TokenMap:
        """The best by ``ctx.scores["cls"]``, besides the ``ctx.protect`` first."""
        scores = scores_of(self, ctx, "cls")
        return keep_top(ctx, scores, budget(self.keep, scores.shape[1] - ctx.protect, round))
