"""FlowCut: Tong et al., "FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models",
NeurIPS 2025, arXiv 2505.19536: its cuts within the vision encoder."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..token_map import TokenMap
from .common import budget, check_keep, check_range, given, keep_top, of_tokens, scores_of
from .context import TokenContext


@dataclass(frozen=True)
class FlowCut:
    """Cut tokens in every other layer of the vision encoder, by a score that accumulates over layers; the more the
    class token's attention is concentrated, the more are cut.

    Args:
        keep: how many tokens, class token not counted, are left at the end: a number (published: 192, 128, 64), or a
            fraction if below 1 (of those that there were at first, rounded to the nearest).
        momentum: weight of the score of the layers before, next to that of this layer.

    Raises:
        TypeError: an argument of another type. ValueError: no token kept, ``momentum`` outside [0, 1].

    Needs the score ``"cls"``, the class token's row of attention averaged over heads, and ``values``, of each layer but
    the last two. Acts in these layers. The score of a token is its share of that row plus its share of the softmax (not
    scaled) of its value's product with the class token's, per head and averaged, all times the 1-norm of its value's
    mean over heads. Without a class token (SigLIP) the row is that of the mean query, softmax of its products with the
    keys per head, averaged, and the score its share times the norm, as published for Qwen2-VL.

    In the layers of Qwen2-VL's and Qwen2.5-VL's towers a token is what the patch merger makes one of: row and values
    are means over its patches, which leave together (the released code drops single patches, and then merges what
    happens to come side by side). The row is that of a frame, over the patches still there, also in layers that attend
    within windows: within a window its parts would sum to one, so that tokens of small windows, at the edge or thinned
    out, would seem to matter most, and scores of different layers would not be of one kind. The frames of a video
    compete; each image or video is a batch of its own. With ``place="output"`` it cuts once, behind a tower, by that
    score of its last layer (within windows, if that layer has any).

    Gives a `TokenMap` in raster order, and puts the accumulated score, fp32 ``[B,N]``, into ``ctx.extra["FlowCut"]``
    for the next layer. Called without a model (one layer), cuts down to ``keep`` at once. All samples of a batch are
    cut to one length, the least that one of them asks for, as published: this is the one reducer whose samples depend
    on their batch, and cutting reads that length on the host. Ties go to the lowest index, NaN is chosen last;
    deterministic. Differs from the released code in fp32 scores and in that a probability of 0 does not make the
    entropy NaN.
    """

    keep: float = 128
    momentum: float = 0.5

    needs: ClassVar[tuple[str, ...]] = ("cls", "values")
    mean_query: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_range("momentum", self.momentum, 0, 1)

    def reduces(self, layer: int, n_layers: int) -> bool:
        """False for the last two layers: LLaVA takes its features from the last but one."""
        return layer < max(n_layers - 2, 1)

    def __call__(self, ctx: TokenContext, /) -> TokenMap:
        """The cut of this layer among the tokens behind the ``ctx.protect`` first."""
        relation = scores_of(self, ctx, "cls")
        values = of_tokens(ctx, "values", given(self, ctx.values, "values", "values=v[B,N,G,D]"), "[B,N,G,D]").float()
        batch, n = relation.shape
        patches = n - ctx.protect
        target = budget(self.keep, (ctx.n_tokens or n) - ctx.protect, round)
        if patches <= target or not self.reduces(ctx.layer, ctx.n_layers):
            return TokenMap.identity(batch, n, relation.device)
        share = _share(relation, ctx.protect)
        flow = share
        if ctx.protect:
            logits = torch.einsum("bgd,bngd->bgn", values[:, 0], values)
            flow = flow + _share(logits.softmax(-1).mean(1), ctx.protect)
        score = flow * values.mean(2).abs().sum(-1)
        if "FlowCut" in ctx.extra:
            before = of_tokens(ctx, 'extra["FlowCut"]', ctx.extra["FlowCut"], "[B,N]")
            score = self.momentum * before + (1 - self.momentum) * score
        ctx.extra["FlowCut"] = score
        left = max(ctx.n_layers - 2, 1) - ctx.layer - 1
        if left % 2:
            return TokenMap.identity(batch, n, relation.device)
        return keep_top(ctx, score, target if left == 0 else self._length(share, patches, target, left))

    def _length(self, share: Tensor, patches: int, target: int, left: int) -> int:
        """To how many patches the batch is cut with ``left`` layers to go, at least ``target``."""
        entropy = -torch.special.xlogy(share, share).nansum(1) / math.log(patches)
        cut = ((patches - target) / math.sqrt(left) * (1 - entropy**2)).round()
        most = int(cut.nan_to_num(0).max()) if len(cut) else 0
        return max(patches - max(most, 0), target)


def _share(scores: Tensor, protect: int) -> Tensor:
    """``scores[B,N]`` over their sum, the first ``protect`` not counted: 0."""
    scores = torch.cat([torch.zeros_like(scores[:, :protect]), scores[:, protect:]], 1)
    return scores / scores.nansum(1, keepdim=True)
