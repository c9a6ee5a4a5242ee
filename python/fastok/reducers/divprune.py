"""DivPrune: Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", CVPR 2025,
arXiv 2503.02175."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.k_center import k_center
from ..ops.select import top_tokens
from ..token_map import TokenMap
from .common import BeforeLanguageModel, check_keep, farthest
from .context import TokenContext


@dataclass(frozen=True)
class DivPrune(BeforeLanguageModel):
    """Keep the tokens that are farthest apart: first the most isolated one, then always the one whose nearest kept
    token is farthest, by cosine.

    Args:
        keep: how many tokens to keep: a fraction if below 1 (of those that are not padding, rounded to the nearest;
            published: 0.098 for images, 0.1 for videos), else a number.
        compat: compute distances in the dtype of the tokens and let a token be picked again, as released: where nothing
            but duplicates is left, fewer than ``keep`` different tokens remain.

    Raises:
        TypeError: ``keep`` of another type. ValueError: no token kept.

    Needs nothing but ``hidden`` (and ``"valid"``, where there is padding). Acts before the language model, on all crops
    of an image together. Gives a `TokenMap` of ``keep`` tokens in raster order, ragged where padding makes it so; the
    identity where there are no more. Ties go to the lowest index, NaN is chosen last; deterministic, no host
    synchronisation, and samples do not depend on their batch. Costs k passes over the tokens, see
    :func:`fastok.k_center`; with ``compat``, an N x N matrix. Differs from the released code, besides, in that newline
    embeddings are no candidates: they all stay.
    """

    keep: float = 0.098
    compat: bool = False

    needs: ClassVar[tuple[str, ...]] = ("valid",)
    whole_image: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def __call__(self, ctx: TokenContext, /) -> TokenMap:
        """The choice among the tokens behind the ``ctx.protect`` first."""
        return farthest(ctx, self.keep, _as_released if self.compat else lambda x, k: k_center(x, k)[0])


def _as_released(x: Tensor, k: int) -> Tensor:
    """int64 ``[B,k]``, in which a token may come again."""
    unit = x / x.norm(dim=-1, keepdim=True)
    distance = 1 - unit @ unit.mT
    pick = top_tokens(distance.topk(2, dim=1, largest=False).values[:, 1], 1)
    picks = [pick]
    least = torch.full_like(distance[:, 0], torch.inf)
    for _ in range(k - 1):
        least = least.minimum(distance.take_along_dim(pick[..., None], 1)[:, 0])
        pick = top_tokens(least, 1)
        picks.append(pick)
    return torch.cat(picks, 1)
