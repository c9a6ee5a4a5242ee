"""MMTok: Dong et al., "MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs", ICLR 2026,
arXiv 2508.18264."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.max_coverage import max_coverage
from ..token_map import TokenMap
from .common import (
    BeforeLanguageModel,
    budget,
    check_keep,
    check_range,
    keep_where,
    picked,
    text_of,
    unit,
    valid_of,
    vision_of,
)
from .context import TokenContext


@dataclass(frozen=True)
class MMTok(BeforeLanguageModel):
    """Keep the tokens that together best cover the words of the question and the tokens of the image.

    Args:
        keep: how many tokens each crop keeps: a number (published: 64), or a fraction if below 1 (of N, rounded down).
        alpha: weight of covering the image's tokens, next to the text's.
        tau_text: temperature of the softmax over image tokens, of the cosine with each text token.
        tau_vision: the same of the cosine with each image token.

    Raises:
        TypeError: an argument of another type. ValueError: no token kept, a negative ``alpha``, a temperature <= 0.

    Needs ``text``, and ``"vision"``, the features of the encoder, in which image tokens are compared with each other;
    with the text they are compared as ``hidden``. Tokens that ``extra["valid"]`` denies, if it is given, are not
    chosen. Acts before the language model, on each crop alone. Gives a `TokenMap` of ``keep`` tokens in raster order;
    all of them where there are no more. Ties go to the lowest index, NaN is chosen last; deterministic, no host
    synchronisation. Costs an (m + N) x N matrix, and what :func:`fastok.max_coverage` takes. All of ``text`` counts:
    the released code leaves out stop words and the phrases that ask for a form of answer.
    """

    keep: float = 64
    alpha: float = 0.5
    tau_text: float = 0.02
    tau_vision: float = 0.2

    needs: ClassVar[tuple[str, ...]] = ("text", "vision")

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_range("alpha", self.alpha, 0)
        for name, value in (("tau_text", self.tau_text), ("tau_vision", self.tau_vision)):
            check_range(name, value, 0)
            if value == 0:
                raise ValueError(f"{name} must be above 0, got 0")

    def __call__(self, ctx: TokenContext, /) -> TokenMap:
        """The choice among the tokens behind the ``ctx.protect`` first."""
        x, vision = (unit(features[:, ctx.protect :]) for features in (ctx.hidden.detach(), vision_of(self, ctx)))
        text, valid = unit(text_of(self, ctx)), valid_of(ctx)
        batch, n = x.shape[:2]
        k = budget(self.keep, n, int)
        if k == n:
            return TokenMap.identity(batch, ctx.hidden.shape[1], x.device)
        words = _shares(text @ x.mT, self.tau_text)
        tokens = _shares(vision @ vision.mT, self.tau_vision) * self.alpha
        similarity = torch.cat([words, tokens], 1)
        if valid is not None:
            similarity = similarity.masked_fill(~valid[:, None, ctx.protect :], torch.nan)
        return keep_where(ctx, picked(max_coverage(similarity, k)[0], n), k)


def _shares(similarity: Tensor, temperature: float) -> Tensor:
    """Softmax over tokens; all R rows weigh 1 together. A NaN token has no share, nor has any token in its row."""
    likely = similarity.masked_fill(similarity.isnan(), -torch.inf)
    shares = (likely / temperature).softmax(-1) / max(similarity.shape[1], 1)
    return shares.nan_to_num(0)
