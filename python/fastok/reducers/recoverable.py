"""Recoverable Compression: Chen et al., "Recoverable Compression: A Multimodal Vision Token Recovery Mechanism Guided
by Text Information", AAAI 2025, arXiv 2409.01179."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.checks import check_int
from ..ops.match import nearest
from ..ops.select import density_peaks
from ..token_map import TokenMap
from .common import BeforeLanguageModel, check_range, extra_of, outliers, text_of, unit, vision_of
from .context import TokenContext


@dataclass(frozen=True)
class RecoverableCompression(BeforeLanguageModel):
    """Keep the tokens that stand out by their similarity to the class token, recover those that stand out by their
    similarity to the question, and merge the others into a few.

    Args:
        clusters: how many tokens the others are merged into; 0 drops them.
        scale: a token stands out if its similarity exceeds the third quartile by more than ``scale`` times the
            interquartile range; the second time, of what the first left.
        neighbors: how many nearest tokens make the density of a token, from which cluster centres are found.

    Raises:
        TypeError: an argument of another type. ValueError: a negative ``clusters`` or ``scale``, no ``neighbors``.

    Needs ``"vision"``, ``"vision_cls"`` and ``text``. The question is the mean of the text tokens, compared with
    ``hidden``, which is in their space; where ``extra["question"]``, ``[B,C_v]`` or ``[1,C_v]``, is given (the
    embedding by CLIP's text tower of the paper), it is that, compared with ``"vision"``. All similarities are cosines.
    Clusters are found among the features of the encoder (:func:`fastok.density_peaks`; members by Euclidean distance).
    Acts before the language model. Gives a ragged `TokenMap`, how many tokens depends on the image: those kept and
    recovered in raster order, then the clusters by their centres, each the mean of its members. Ties go to the lowest
    index, tokens with NaN are dropped; deterministic, no host synchronisation, and samples do not depend on their
    batch. No code was released: the cut is the one of LLaVA-PruMerge, and the clustering, with 10 clusters, is assumed.
    """

    clusters: int = 10
    scale: float = 1.5
    neighbors: int = 5

    needs: ClassVar[tuple[str, ...]] = ("vision", "vision_cls", "text")
    ragged: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, value, least in (("clusters", self.clusters, 0), ("neighbors", self.neighbors, 1)):
            check_int(name, value)
            check_range(name, value, least)
        check_range("scale", self.scale, 0)

    def __call__(self, ctx: TokenContext, /) -> TokenMap:
        """The reduction of the tokens behind the ``ctx.protect`` first."""
        vision = vision_of(self, ctx)[:, ctx.protect :].float()
        batch, n = vision.shape[:2]
        token = extra_of(self, ctx, "vision_cls")
        visual = self._similarity(vision, token, 'extra["vision_cls"]')
        if "question" in ctx.extra:
            textual = self._similarity(vision, extra_of(self, ctx, "question"), 'extra["question"]')
        else:
            textual = self._similarity(
                ctx.hidden.detach()[:, ctx.protect :], text_of(self, ctx).float().mean(1), "text"
            )
        kept = outliers(visual, self.scale)
        kept = kept | outliers(textual.masked_fill(kept, torch.nan), self.scale)
        slots = torch.where(kept, kept.cumsum(1) - 1, -1)
        counts = kept.sum(1, keepdim=True)
        if self.clusters > 0 and n > 0:
            cluster, found = self._clusters(vision.masked_fill(kept[..., None], torch.nan))
            slots = torch.where(cluster >= 0, cluster + counts, slots)
            counts = counts + found
        protected = torch.arange(ctx.protect, device=slots.device).expand(batch, -1)
        assign = torch.cat([protected, torch.where(slots < 0, -1, slots + ctx.protect)], 1)
        return TokenMap._trusted(assign.int(), ctx.protect + n, (counts[:, 0] + ctx.protect).int())

    def _similarity(self, x: Tensor, y: Tensor, name: str) -> Tensor:
        """fp32 ``[B,n]``, cosines of ``x[B,n,C]`` with ``y[B,C]``."""
        if y.dim() != 2 or y.shape[0] not in (1, x.shape[0]) or y.shape[1] != x.shape[2]:
            raise ValueError(f"{name} must be [B,C], here B={x.shape[0]}, C={x.shape[2]}; got {list(y.shape)}")
        return (unit(x) * unit(y)[:, None]).sum(-1)

    def _clusters(self, rest: Tensor) -> tuple[Tensor, Tensor]:
        """The cluster of each token of ``rest[B,n,C]``, -1 for NaN, and how many there are, ``[B,1]``."""
        n = rest.shape[1]
        absent = rest.isnan().any(-1)
        centers = density_peaks(rest, min(self.clusters, n), neighbors=min(self.neighbors, n))
        empty = absent.gather(1, centers)
        centers = centers.masked_fill(empty, n).sort(1).values
        exists = centers < n
        at = rest.take_along_dim(centers.clamp(max=n - 1)[..., None], 1)
        cluster = nearest(rest, at, similarity="euclidean", mask=exists)[1][..., 0]
        return cluster.masked_fill(absent, -1), exists.sum(1, keepdim=True)
