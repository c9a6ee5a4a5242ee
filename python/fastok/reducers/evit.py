"""EViT: Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations",
ICLR 2022, arXiv 2202.07800."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.checks import check_int
from ..token_map import SoftMap, TokenMap
from .common import budget, check_keep, scores_of
from .context import TokenContext


@dataclass(frozen=True)
class EViT:
    """Keep the tokens that the class token attends to most, in some layers, and fuse the others into one.

    Args:
        keep: how many of the unprotected tokens such a layer keeps: a fraction if below 1 (rounded up; the published
            rates are 0.9, 0.7 and 0.5), else a number.
        fuse: add one token, the sum of the others weighted by the attention that the class token pays them. As
            published, the weights are not normalised, and the fused token is an ordinary one in the next such layer.
        layers: where to reduce, counted from 0. None: after one, two and three quarters of the layers, which is the
            published (3, 6, 9) of 12.

    Raises:
        TypeError: ``keep`` or ``layers`` of another type. ValueError: no token kept, or a negative layer.

    Called with a `TokenContext` that has the score ``"cls"``, the class token's row of attention averaged over heads,
    gives a `SoftMap` (a `TokenMap` without ``fuse``, or where nothing is removed): protected tokens first, then the
    kept ones by falling score (ties: lowest index), then the fused one. Protected are the ``ctx.protect`` first tokens;
    the published method has only the class token there. Deterministic; gradients flow through the tokens, not through
    the scores, so models can be trained with it (the paper lets ``keep`` fall from 1 during training).
    """

    keep: float = 0.7
    fuse: bool = True
    layers: tuple[int, ...] | None = None

    needs: ClassVar[tuple[str, ...]] = ("cls",)
    sized: ClassVar[bool] = False  # the fused token counts as any other

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.layers is not None:
            if not isinstance(self.layers, tuple):
                raise TypeError(f"layers must be None or a tuple of ints, got {self.layers!r}")
            for layer in self.layers:
                check_int("layers", layer)
                if layer < 0:
                    raise ValueError(f"layers must be >= 0, got {layer}")

    def reduces(self, layer: int, n_layers: int) -> bool:
        """False for the layers in between."""
        places = [n_layers * quarters // 4 for quarters in (1, 2, 3)] if self.layers is None else self.layers
        return layer in places

    def __call__(self, ctx: TokenContext, /) -> TokenMap | SoftMap:
        """The published selection among the tokens behind the ``ctx.protect`` first."""
        scores = scores_of(self, ctx, "cls")
        batch, n = scores.shape
        if not 0 <= ctx.layer < ctx.n_layers:
            raise ValueError(f"layer must be within [0, n_layers={ctx.n_layers}), got {ctx.layer}")
        candidates = n - ctx.protect
        count = budget(self.keep, candidates, math.ceil)
        if count >= candidates or not self.reduces(ctx.layer, ctx.n_layers):
            return TokenMap.identity(batch, n, scores.device)
        attention = torch.where(scores.isnan(), -torch.inf, scores)
        best = attention[:, ctx.protect :].sort(descending=True, stable=True).indices[:, :count]
        protected = torch.arange(ctx.protect, device=scores.device).expand(batch, -1)
        kept = torch.cat([protected, best + ctx.protect], 1)
        return _with_the_rest(kept, attention) if self.fuse else TokenMap.keep(kept, n)


def _with_the_rest(kept: Tensor, attention: Tensor) -> SoftMap:
    """The tokens ``kept[B,K]``, and the others summed by their ``attention[B,N]``."""
    rest = attention.clamp(min=0).scatter(1, kept, 0)
    weights = attention.new_zeros(len(kept), kept.shape[1], attention.shape[1]).scatter(2, kept[..., None], 1)
    return SoftMap.from_dense(torch.cat([weights, rest[:, None]], 1))
