"""``semantic_tokens``: the visual tokens of a prompt that resemble its text, whose values VidKV protects."""

import torch
from torch import Tensor

from ..ops.checks import ACTIVATIONS, check_dtype, check_same_device, check_shape
from .formats import check_share

STEP = 32  # as many tokens, or a multiple


def semantic_tokens(
    hidden: Tensor, visual: Tensor, *, share: float = 0.2, mask: Tensor | None = None, compat: bool = False
) -> Tensor:
    """bool ``[B,T]``: the visual tokens that are most like the text.

    Args:
        hidden: ``[B,T,C]`` fp32, fp16 or bf16: the prompt's embeddings as a language model is given them.
        visual: bool ``[B,T]``: which tokens are of images or videos. All others are text.
        share: how many of each sample's visual tokens: that share of them, rounded down to a multiple of 32, and 32 at
            least. A sample without text has none.
        mask: bool ``[B,T]``: False for padding, which is neither.
        compat: as in VidKV's release, which loses the last 32 of them in the order of the prompt.

    Raises:
        TypeError: a dtype that is not listed. ValueError: shapes or devices that do not fit, ``share`` outside [0, 1].

    A token's score is the mean of its inner products with the text's tokens, in fp32. Ties go to the lower index; NaN
    is last. No gradient; deterministic; no host synchronisation. Semantic token protection of VidKV (Tao et al., 2025).
    """
    check_dtype("hidden", hidden, ACTIVATIONS)
    check_shape("hidden", hidden, (None, None, None), "[B,T,C]")
    for name, flags in (("visual", visual), ("mask", mask)):
        if flags is not None:
            check_dtype(name, flags, (torch.bool,))
            check_shape(name, flags, tuple(hidden.shape[:2]), "[B,T] of hidden")
            check_same_device(name, flags, "hidden", hidden.device)
    check_share("share", share)
    if not isinstance(compat, bool):
        raise TypeError(f"compat must be True or False, got {compat!r}")
    x = hidden.detach().float()
    there = torch.ones_like(visual) if mask is None else mask
    text, visual = ~visual & there, visual & there
    words = text.sum(1, keepdim=True)
    mean = torch.where(text[..., None], x, 0).sum(1) / words.clamp(min=1)
    scores = torch.einsum("btc,bc->bt", x, mean).nan_to_num(-torch.inf, torch.inf, -torch.inf)
    order = torch.where(visual, scores, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    order = order.gather(1, (~visual).gather(1, order).to(torch.int8).sort(dim=1, stable=True).indices)
    most = (visual.sum(1, keepdim=True).double() * share).long() // STEP * STEP
    most = torch.where(words > 0, most.clamp(min=STEP), 0)
    rank = torch.arange(order.shape[1], device=x.device).expand(order.shape)
    chosen = torch.zeros_like(visual).scatter(1, order, rank < most) & visual
    if compat:
        chosen &= chosen.cumsum(1) <= chosen.sum(1, keepdim=True) - STEP
    return chosen
