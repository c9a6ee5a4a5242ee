"""VisionZip: Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models", CVPR 2025,
arXiv 2412.04467."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.match import nearest
from ..ops.select import top_tokens
from ..token_map import SoftMap, TokenMap
from .common import BeforeLanguageModel, budget, check_keep, keep_where, keys_of, picked, scores_of
from .context import TokenContext

AGGREGATES = ("add", "mean")


@dataclass(frozen=True)
class VisionZip(BeforeLanguageModel):
    """Keep the tokens that the class token attends to most, and merge the others into a few.

    Args:
        dominant: how many tokens are kept, protected ones such as the class token counted: a number (published: 162,
            108, 54), or a fraction of N if below 1 (rounded down).
        contextual: how many tokens the others are merged into, likewise (published: 30, 20, 10); 0 drops them.
        aggregate: ``"add"``, as published: a merged token is one of its members, the target, plus the mean of the rest;
            or ``"mean"``, the mean of all its members.

    Raises:
        TypeError: an argument of another type. ValueError: no dominant token, an unknown ``aggregate``.

    Needs the score ``"cls"``, the class token's row, averaged over heads, of encoders without a class token the mean
    over all rows; and ``keys``. Acts before the language model, on each crop alone. Targets are evenly spaced among the
    tokens that are not dominant; every other goes to the target whose key, the mean over heads, is most similar by
    cosine. Gives a `SoftMap` (a `TokenMap` with ``"mean"`` or without contextual tokens, and where N tokens are no more
    than asked for, which stay as they are): dominant tokens in raster order, then contextual ones. Ties go to the
    lowest index, NaN is chosen last, tokens with NaN keys are dropped; deterministic, no host synchronisation, and
    samples do not depend on their batch. Where the class token is not among the tokens, one more of these is dominant
    than in the released code, so that the number of tokens is the same.
    """

    dominant: float = 162
    contextual: float = 30
    aggregate: str = "add"

    needs: ClassVar[tuple[str, ...]] = ("cls", "keys")

    def __post_init__(self) -> None:
        check_keep(self.dominant, "dominant")
        check_keep(self.contextual, "contextual", least=0)
        if self.aggregate not in AGGREGATES:
            raise ValueError(f"aggregate must be one of {', '.join(map(repr, AGGREGATES))}; got {self.aggregate!r}")

    def __call__(self, ctx: TokenContext, /) -> TokenMap | SoftMap:
        """The reduction of ``ctx.hidden``, of which the ``ctx.protect`` first are dominant."""
        scores, keys = scores_of(self, ctx, "cls"), keys_of(self, ctx)
        batch, n = scores.shape
        dominant = max(budget(self.dominant, n, int), ctx.protect)
        contextual = budget(self.contextual, n, int)
        if dominant + contextual >= n:
            return TokenMap.identity(batch, n, scores.device)
        kept = picked(top_tokens(scores, dominant - ctx.protect, protect=ctx.protect), n)
        if contextual == 0:
            return keep_where(ctx, kept[:, ctx.protect :], dominant - ctx.protect)
        rest = kept.int().sort(dim=1, stable=True).indices[:, : n - dominant]
        targets = rest[:, :: max(1, rest.shape[1] // contextual)][:, :contextual]
        metric = keys.float().mean(2)
        mate = nearest(metric, metric.take_along_dim(targets[..., None], 1))[1][..., 0]
        slot = torch.where(mate < 0, -1, mate + dominant)
        slot = torch.where(kept, kept.cumsum(1) - 1, slot)
        slot = slot.scatter(1, targets, torch.arange(contextual, device=slot.device).expand(batch, -1) + dominant)
        if self.aggregate == "mean":
            return TokenMap._trusted(slot.int(), dominant + contextual)
        return SoftMap.from_dense(_added(slot, kept | picked(targets, n), dominant + contextual))


def _added(slot: Tensor, whole: Tensor, n_out: int) -> Tensor:
    """fp32 ``[B,n_out,N]``: weight 1 for the tokens that count ``whole``; the others of a slot share one more."""
    member = slot[:, None] == torch.arange(n_out, device=slot.device)[:, None]
    others = (member & ~whole[:, None]).float()
    return torch.where(whole[:, None], member.float(), others / others.sum(-1, keepdim=True).clamp(min=1))
