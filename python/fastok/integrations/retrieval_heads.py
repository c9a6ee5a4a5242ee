"""``retrieval_heads``: which heads look things up far back, found by what they do with repeated random tokens."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..flash import padded
from ..ops.attention import attention
from ..ops.checks import check_at_least
from .calibrate import attention_layers, counting
from .swap import Swaps


def retrieval_heads(
    model: nn.Module,
    *,
    induction: float = 0.14,
    echo: float = 0.01,
    length: int = 2500,
    repeats: int = 4,
    seed: int = 0,
) -> Tensor:
    """The KV heads that RazorAttention lets keep everything.

    The model reads ``length`` random tokens, ``repeats`` times over. A head's echo score is the mean attention of a
    token to itself in earlier repeats, its induction score that to the token behind it there; of a KV head, the
    largest of its query heads'. Chosen are the best of all layers together by either score.

    Args:
        model: a transformers causal language model (or its decoder) with separate query and key projections.
        induction, echo: shares of all KV heads that are chosen by either score, within [0, 1]; rounded up.
        length, repeats: of the random tokens; at least 2 repeats. Published: 2500 tokens, 4 times.
        seed: of the random tokens.

    Returns:
        bool ``[layers,G]``, on the CPU, for :class:`fastok.sparse.RazorCache`.

    Raises:
        TypeError: no attention layers of that kind in the model, or an argument of another type. ValueError: an
        argument out of range.

    Queries and keys are those after rotary embedding, in the model's dtype; logits and probabilities are fp32, ties go
    to the lowest layer and head. The model is left as it was; no gradients. Tang et al.,
    "RazorAttention", arXiv 2407.15891.
    """
    for name, share in (("induction", induction), ("echo", echo)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must be within [0, 1], got {share}")
    check_at_least("length", length, 1)
    check_at_least("repeats", repeats, 2)
    layers = attention_layers(model)
    found, swaps = [_Diagonals(layer, length) for layer in layers], Swaps()
    device = layers[0].q_proj.weight.device
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.config.get_text_config().vocab_size, (1, length), generator=random).to(device)  # type: ignore[operator, union-attr]
    try:
        for layer, diagonals in zip(layers, found, strict=True):
            swaps.swap(layer, diagonals, counting)
        with torch.no_grad():
            model(tokens.repeat(1, repeats), use_cache=False)
    finally:
        swaps.restore()
    if any(diagonals.scores is None for diagonals in found):
        raise TypeError(f"{type(model).__name__} did not run all of its {len(layers)} attention layers")
    scores = torch.stack([diagonals.scores for diagonals in found if diagonals.scores is not None], 1).cpu()
    chosen = torch.zeros(scores[0].numel(), dtype=torch.bool)
    for score, share in zip(scores.flatten(1), (echo, induction), strict=True):
        best = torch.where(score.isnan(), -math.inf, score).sort(descending=True, stable=True).indices
        chosen[best[: math.ceil(share * len(score))]] = True
    return chosen.view(scores.shape[1:])


class _Diagonals:
    """One layer's echo and induction scores ``[2,G]``."""

    def __init__(self, layer: Any, period: int) -> None:
        self.layer, self.period = layer, period
        self.scores: Tensor | None = None

    def add(self, q: Tensor, k: Tensor) -> None:
        """Of the model's ``q[1,T,H,D]`` and ``k[1,T,G,D]``."""
        total, ratio = q.shape[1], q.shape[2] // k.shape[2]
        scale = getattr(self.layer, "scaling", q.shape[3] ** -0.5)
        narrow = k[..., :8].contiguous()  # of the attention only the log-sum-exp is wanted
        lse = attention(padded(q), padded(k), narrow, scale=scale, causal=True)[1][0].transpose(0, 1)
        keys, sums = k[0].float().repeat_interleave(ratio, 1), []
        for ahead in (0, 1):
            p, count = lse.new_zeros(q.shape[2]), 0
            for back in range(self.period, total, self.period):
                columns = keys[ahead : ahead + total - back]
                logits = (q[0, back:].float() * columns).sum(-1) * scale
                p, count = p + (logits - lse[back:]).exp().sum(0), count + total - back
            sums.append((p / count).unflatten(0, (-1, ratio)).amax(1))
        self.scores = torch.stack(sums)
