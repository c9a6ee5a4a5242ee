"""ToDRE: Li et al., "ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance",
arXiv 2505.18757."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.k_center import OBJECTIVES, k_center
from ..ops.select import top_tokens
from ..token_map import TokenMap
from .common import BeforeLanguageModel, check_keep, crops_of, farthest, scores_of
from .context import TokenContext


@dataclass(frozen=True)
class ToDRE(BeforeLanguageModel):
    """Keep tokens that are far apart, starting from the one that the class token attends to most (the first stage).

    Args:
        keep: how many tokens to keep: a fraction if below 1 (of those that are not padding, rounded to the nearest),
            else a number. Published: 288 and 720 of LLaVA-NeXT's 2880, a tenth and a quarter.
        objective: what the next token maximises: ``"max_sum"``, the sum of its cosine distances to those kept (the
            paper's second version), or ``"max_min"``, the smallest of them (its first).

    Raises:
        TypeError: ``keep`` of another type. ValueError: no token kept, an unknown objective.

    Needs the score ``"cls"``, of encoders without a class token the mean over all rows (where the paper takes a random
    start); ``"valid"`` and ``"crops"``. Acts before the language model, on all crops of an image together: the start is
    in the thumbnail, if there is one. Gives a `TokenMap` of ``keep`` tokens in raster order, ragged where padding makes
    it so; the identity where there are no more. Ties go to the lowest index, NaN is chosen last; deterministic, no host
    synchronisation, and samples do not depend on their batch. Costs k passes over the tokens, see
    :func:`fastok.k_center`. The paper leaves open in which order tokens stay (raster order is assumed) and what becomes
    of newline embeddings (they are removed). Its second stage, which acts inside the language model, is not in this.
    """

    keep: float = 0.1
    objective: str = "max_sum"

    needs: ClassVar[tuple[str, ...]] = ("cls", "valid", "crops")
    whole_image: ClassVar[bool] = True
    newlines: ClassVar[str] = "none"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}; got {self.objective!r}")

    def __call__(self, ctx: TokenContext, /) -> TokenMap:
        """The choice among the tokens behind the ``ctx.protect`` first."""
        scores = scores_of(self, ctx, "cls")[:, ctx.protect :]
        rows, columns = crops_of(ctx, flat=True)
        thumbnail = scores.shape[1] // (1 + rows * columns)

        def pick(x: Tensor, k: int) -> Tensor:
            known = scores.masked_fill(x.isnan().any(-1), torch.nan)
            pivot = top_tokens(known[:, :thumbnail], 1)[:, 0]
            return k_center(x, k, objective=self.objective, start=pivot)[0]

        return farthest(ctx, self.keep, pick)
