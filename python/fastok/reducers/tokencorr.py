"""TokenCorrCompressor: Zhang et al., "Token-level Correlation-guided Compression for Efficient Multimodal Document
Understanding", arXiv 2407.14439."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..token_map import TokenMap
from .common import BeforeLanguageModel, check_range, keep_where, keys_of, ranks, scores_of, unit
from .context import TokenContext

_ROWS = 1024
"""How many rows of the matrix of similarities exist at a time."""


@dataclass(frozen=True)
class TokenCorr(BeforeLanguageModel):
    """Each crop keeps as many tokens as are not redundant in it: half of them by what the class token attends to late,
    half by what it attends to in the middle of the vision encoder.

    Args:
        similarity: two tokens are alike if the cosine of their keys, all heads together, is above this.
        partners: a token is redundant if it is like more than this share of the tokens (itself not counted).

    Raises:
        TypeError: an argument of another type.
        ValueError: ``similarity`` outside [-1, 1] or ``partners`` outside [0, 1].

    Needs ``keys`` and the scores ``"cls"`` and ``"cls:mid"``, the class token's row, averaged over heads, in the layer
    that makes the features and in the middle one. Acts before the language model, on each crop alone. Gives a ragged
    `TokenMap` in raster order: as many tokens as are not redundant, at least one. If the number is odd, the late score
    has one more; what both would choose, the middle one replaces by its next best. Ties go to the lowest index, NaN is
    chosen last and is like nothing; deterministic, no host synchronisation, and samples do not depend on their batch.
    Costs N x N similarities, never all in memory. No code was released: thresholds, layers and the halves are assumed,
    and the choice is deterministic where the paper may sample.
    """

    similarity: float = 0.9
    partners: float = 0.1

    needs: ClassVar[tuple[str, ...]] = ("keys", "cls", "cls:mid")
    ragged: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range("similarity", self.similarity, -1, 1)
        check_range("partners", self.partners, 0, 1)

    def score_layers(self, n_layers: int) -> dict[str, tuple[int, ...]]:
        """The middle one; the late score is of the layer that makes the features."""
        return {"cls:mid": (n_layers // 2,)}

    def __call__(self, ctx: TokenContext, /) -> TokenMap:
        """The choice among the tokens behind the ``ctx.protect`` first."""
        keys = keys_of(self, ctx)[:, ctx.protect :]
        late, middle = (scores_of(self, ctx, name)[:, ctx.protect :] for name in ("cls", "cls:mid"))
        n = keys.shape[1]
        count = (self._partners(unit(keys.flatten(2))) <= self.partners * n).sum(1, keepdim=True).clamp(min=1)
        half = count - count // 2
        first = ranks(late) < half
        second = ranks(middle.masked_fill(first, torch.nan)) < count - half
        return keep_where(ctx, first | second, n)

    def _partners(self, keys: Tensor) -> Tensor:
        """int64 ``[B,N]``: how many other tokens each is like."""
        token = torch.arange(keys.shape[1], device=keys.device)
        counts = []
        for rows in token.split(_ROWS):
            alike = (keys[:, rows] @ keys.mT) > self.similarity
            counts.append((alike & (token != rows[:, None])).sum(-1))
        return torch.cat(counts, 1)
