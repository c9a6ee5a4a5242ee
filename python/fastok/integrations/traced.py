"""The layout of shortened prompts in a compiled graph: from tensors alone, nothing read on the host.

That takes prompts of which each has as many images, of as many tokens each, that are reduced to as many each; how long
the shortened prompts are is known then from shapes. What cannot be known is checked when the graph runs.
"""

from typing import Any

import torch
from torch import Tensor

from ..reducers.context import Reducer
from ..token_map import TokenMap
from .prompt import Layout, Span
from .visual import Reduced, Visual, merged_by


def traceable(visuals: list[Visual], batch: int) -> bool:
    """Whether all images have as many tokens, in one crop each, and as many for each of ``batch`` prompts."""
    plain = [visual.packed is None and visual.merged is None for visual in visuals]
    return (
        len(visuals) > 0
        and all(plain)
        and len({visual.hidden.shape for visual in visuals}) == 1
        and len(visuals) % batch == 0
    )


def text_of(x: Tensor, placeholders: Tensor, images: int, n: int) -> Tensor:
    """``[B,m,C]``: what of ``x[B,S,C]`` is no placeholder, of which there are ``images * n`` in each row."""
    columns = placeholders.int().sort(dim=1, stable=True).indices[:, : x.shape[1] - images * n]
    return x.take_along_dim(columns[..., None], 1)


def reduced(visual: Visual, reducer: Reducer, text: Tensor | None) -> Reduced:
    """As `visual.reduce`, of one crop whose map fills all its slots."""
    whole: bool = getattr(reducer, "whole_image", False)
    visual.extra.pop("crops", None)  # there are none, and reading that would end the graph
    token_map, merged = merged_by(visual, reducer, text, whole)
    name = type(reducer).__name__
    if isinstance(token_map, TokenMap):
        torch._assert_async(
            (token_map.counts == token_map.n_out).all(),
            f"{name} left fewer tokens than its map has room for, which a compiled graph cannot hold: say so by its "
            "attribute ragged = True",
        )
    numbers = torch.arange(visual.hidden.shape[1], device=merged.device)
    source = representatives(token_map, numbers)
    return Reduced(merged[0], source, token_map, torch.arange(token_map.n_out, device=merged.device), [], 0.0)


def representatives(token_map: Any, numbers: Tensor) -> Tensor:
    """int64 ``[M]``: the first member of each output of one sample; of weights, the first of the largest."""
    if isinstance(token_map, TokenMap):
        return token_map.representative[0].clamp(min=0)
    weights = token_map.dense()[0]
    weights = torch.where(weights != 0, weights, -torch.inf)
    best = (weights == weights.amax(-1, keepdim=True)) & (weights != -torch.inf)
    return torch.where(best, numbers, len(numbers)).amin(-1).clamp(max=max(len(numbers) - 1, 0))


def rearrange(placeholders: Tensor, images: list[Reduced], n: int) -> tuple[Layout, list[Span]]:
    """As `prompt.rearrange`: images of ``n`` tokens each in place of the ``placeholders[B,S]``, row by row.

    Raises (when the graph runs):
        RuntimeError: prompts have another number of placeholders, or those of an image are not side by side.
    """
    (batch, width), m, device = placeholders.shape, len(images[0].features), placeholders.device
    each, gone = len(images) // batch, n - m
    torch._assert_async(
        (placeholders.sum(1) == each * n).all(),
        f"in a compiled graph, each prompt must have {each * n} image placeholders for {each} images of {n} tokens",
    )
    where = (~placeholders).int().sort(dim=1, stable=True).indices[:, : each * n].view(batch, each, n)
    start = where[..., 0]
    torch._assert_async(
        (where[..., -1] - start == n - 1).all(), "the placeholders of an image must be side by side in one prompt"
    )
    length = width - each * gone
    numbers = torch.arange(width, device=device).expand(batch, -1)
    before = placeholders.cumsum(1) // n * gone  # of what is no placeholder
    target = torch.where(placeholders, length, numbers - before)
    earlier = torch.arange(each, device=device)[:, None] * gone
    within = torch.arange(m, device=device)
    place = (start[..., None] - earlier + within).flatten(1)
    source = torch.stack([image.source for image in images]).view(batch, each, m)

    def placed(text: Tensor, image: Tensor) -> Tensor:
        out = text.new_zeros(batch, length + 1).scatter(1, target, text)
        return out.scatter(1, place, image.expand(batch, each, m).flatten(1))[:, :length]

    layout = Layout(
        placed(numbers, start[..., None] + source),
        placed(numbers, start[..., None] + within),
        placed(before, earlier),
        torch.full((batch,), each * gone, device=device),
        [],
        torch.arange(batch, device=device)[:, None].expand_as(place).flatten(),
        place.flatten(),
        False,
    )
    return layout, [Span(0, 0, n, image.features, image.source) for image in images]
