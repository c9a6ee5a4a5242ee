"""LLaVolta: Chen et al., "Efficient Large Multi-modal Models via Visual Context Compression", NeurIPS 2024,
arXiv 2406.20092: its average-pooling compressor."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..ops.checks import check_int
from ..token_map import TokenMap
from .common import BeforeLanguageModel
from .context import TokenContext


@dataclass(frozen=True)
class AveragePool(BeforeLanguageModel):
    """Replace every ``stride`` consecutive tokens, in raster order, by their mean.

    Args:
        stride: how many tokens become one (published: 8, then 2 and 1 as training goes on). A rest of fewer tokens is
            dropped, as published; where there are no more than that, they become one.

    Raises:
        TypeError: ``stride`` is not an int. ValueError: ``stride`` below 1.

    Needs nothing but ``hidden``. Acts before the language model (the paper's layer -1; its others, inside, are not in
    this). Gives a `TokenMap` from N to N // ``stride`` tokens. Deterministic, no host synchronisation, and samples do
    not depend on their batch; training works.
    """

    stride: int = 8

    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_int("stride", self.stride)
        if self.stride < 1:
            raise ValueError(f"stride must be at least 1, got {self.stride}")

    def __call__(self, ctx: TokenContext, /) -> TokenMap:
        """The means of the tokens behind the ``ctx.protect`` first."""
        batch, n = ctx.hidden.shape[0], ctx.hidden.shape[1] - ctx.protect
        count = max(n // self.stride, min(n, 1))
        slot = torch.arange(n, device=ctx.hidden.device) // self.stride + ctx.protect
        slot = torch.where(slot < ctx.protect + count, slot, -1)
        assign = torch.cat([torch.arange(ctx.protect, device=slot.device), slot]).int()
        return TokenMap._trusted(assign.repeat(batch, 1), ctx.protect + count)
