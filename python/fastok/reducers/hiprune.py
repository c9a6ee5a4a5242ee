"""HiPrune: Liu et al., "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language
Models", arXiv 2508.00553."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.checks import check_int
from ..ops.select import top_tokens
from ..token_map import TokenMap
from .common import BeforeLanguageModel, budget, check_keep, check_range, crops_of, grid_of, keep_top, picked, scores_of
from .context import TokenContext


@dataclass(frozen=True)
class HiPrune(BeforeLanguageModel):
    """Keep anchors, which receive most attention in the middle of the vision encoder, with their four neighbours, and
    fill up with registers, which receive most of it at the end.

    Args:
        keep: how many tokens to keep: a number (published: 192, 128, 64 for LLaVA-1.5, 640, 320, 160 over all crops
            for LLaVA-NeXT, where each gets an equal part), or a fraction if below 1 (of N, rounded to the nearest).
        alpha: the share of tokens that go to anchors and neighbours: ``round(keep * alpha / 5)`` anchors.
        layer: which layer is the middle, counted from 1. None: 9 of 24 (CLIP-L) and 16 of 32 (Qwen2.5-VL), as
            published; else three eighths of the depth, which is assumed.
        compat: find neighbours as released: one place back or ahead in raster order, also across the ends of rows, and
            beyond the first or last token, that token.

    Raises:
        TypeError: an argument of another type. ValueError: no token kept, ``alpha`` outside [0, 1], ``layer`` below 1.

    Needs the scores ``"column:mid"`` and ``"column:deep"``: what each token receives, averaged over heads and all
    queries, in the middle layer and in the one that makes the features; ``grid``; and ``"crops"``. Acts before the
    language model. Gives a `TokenMap` of ``keep`` tokens in raster order; all of them where there are no more. Where
    anchors and neighbours alone exceed ``keep``, anchors go first, then neighbours by index. Ties go to the lowest
    index, NaN is chosen last; deterministic, no host synchronisation, and samples do not depend on their batch. Frames
    of a video have no neighbours in other frames.
    """

    keep: float = 192
    alpha: float = 0.1
    layer: int | None = None
    compat: bool = False

    needs: ClassVar[tuple[str, ...]] = ("column:mid", "column:deep", "grid", "crops")
    by_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_range("alpha", self.alpha, 0, 1)
        if self.layer is not None:
            check_int("layer", self.layer)
            check_range("layer", self.layer, 1)

    def score_layers(self, n_layers: int) -> dict[str, tuple[int, ...]]:
        """The middle one; the deep score is of the layer that makes the features."""
        published = {32: 16}.get(n_layers, max(round(n_layers * 3 / 8), 1))
        return {"column:mid": ((published if self.layer is None else self.layer) - 1,)}

    def __call__(self, ctx: TokenContext, /) -> TokenMap:
        """The choice among the tokens behind the ``ctx.protect`` first."""
        middle, deep = (scores_of(self, ctx, name)[:, ctx.protect :] for name in ("column:mid", "column:deep"))
        n = deep.shape[1]
        rows, columns = crops_of(ctx)
        keep = self.keep if isinstance(self.keep, float) else max(int(self.keep) // (1 + rows * columns), 1)
        count = budget(keep, n, round)
        grid = grid_of(self, ctx)
        anchors = picked(top_tokens(middle, min(round(count * self.alpha / 5), n)), n)
        near = _neighbours_as_released(anchors, grid[2]) if self.compat else _neighbours(anchors, grid)
        most = torch.finfo(deep.dtype).max
        deep = deep.masked_fill(near & ~deep.isnan(), most).masked_fill(anchors, torch.inf)
        return keep_top(ctx, torch.nn.functional.pad(deep, (ctx.protect, 0)), count)


def _neighbours(mask: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """bool ``[B,N]``: the places in the grid next to one where ``mask[B,N]``."""
    image = torch.nn.functional.pad(mask.unflatten(1, grid), (1, 1, 1, 1))
    up, down = image[..., :-2, 1:-1], image[..., 2:, 1:-1]
    left, right = image[..., 1:-1, :-2], image[..., 1:-1, 2:]
    return (up | down | left | right).flatten(1)


def _neighbours_as_released(mask: Tensor, width: int) -> Tensor:
    """The same of one row of ``n`` places, with steps of 1 and ``width`` that stop at its ends."""
    n = mask.shape[1]
    place = torch.arange(n, device=mask.device)
    near = mask.new_zeros(mask.shape, dtype=torch.int32)
    for step in (-1, 1, -width, width):
        target = (place + step).clamp(0, n - 1).expand_as(mask)
        near = near.scatter_add(1, target, mask.int())
    return near > 0
