"""``protect_semantics``: VidKV's semantic token protection for a vision-language model and its packed cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..caches.semantic import semantic_tokens
from .packed_cache import PackedCache

MODALITIES = ("image", "video")


@contextmanager
def protect_semantics(
    model: Any, cache: PackedCache, *, share: float | None = None, compat: bool = False
) -> Iterator[None]:
    """While it lasts, a prompt that ``model`` puts into ``cache`` has its text-like visual tokens in the high class.

    ::

        cache = fastok.PackedCache("vidkv-1.5/1.66", model)
        with fastok.protect_semantics(model, cache):
            model.generate(**inputs, past_key_values=cache)

    Args:
        model: a vision-language model of transformers, whose config has an ``image_token_id`` or ``video_token_id``.
        cache: of a format of two classes. Its ``salient`` is set when the language model is given a prompt.
        share, compat: see :func:`fastok.semantic_tokens`; None: the format's ``salient``.

    Raises:
        TypeError, ValueError: another model or cache. When the prompt comes: ValueError if it is not given as
        ``input_ids``, or not all of them reach the language model (a reducer dropped some).

    Of a prompt that comes in chunks, the first is looked at. As published, all layers and heads protect the same
    tokens, and those that are generated are never protected.
    """
    if not isinstance(cache, PackedCache):
        raise TypeError(f"cache must be a fastok.PackedCache, got {type(cache).__name__}")
    if not cache.format.two_classes:
        raise ValueError(f"cache must be of a format of two classes, as 'vidkv-1.5/1.66'; got {cache.format}")
    config = getattr(model, "config", None)
    visual_ids = [getattr(config, f"{name}_token_id", None) for name in MODALITIES]
    visual_ids = [token for token in visual_ids if token is not None]
    if not visual_ids or not hasattr(model, "get_decoder"):
        raise ValueError(
            f"model must be a vision-language model of transformers with an image_token_id or video_token_id in its "
            f"config, got {type(model).__name__}"
        )
    given: dict[str, Tensor | None] = {}

    def see_prompt(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given["ids"] = args[0] if args else kwargs.get("input_ids")
        given["mask"] = kwargs.get("attention_mask")

    def mark(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("past_key_values") is not cache or cache.get_seq_length():
            return
        ids, mask, hidden = given["ids"], given["mask"], kwargs.get("inputs_embeds")
        if ids is None or hidden is None or ids.shape != hidden.shape[:2]:
            raise ValueError(
                f"protect_semantics: input_ids must be given and all reach the language model; got "
                f"{None if ids is None else tuple(ids.shape)} of them and {None if hidden is None else hidden.shape} "
                f"there. Set the cache's salient instead"
            )
        visual = torch.isin(ids, torch.tensor(visual_ids, device=ids.device)).to(hidden.device)
        there = None if mask is None or mask.dim() != 2 else mask.bool().to(hidden.device)
        wanted = cache.format.salient if share is None else share
        cache.salient = semantic_tokens(hidden, visual, share=wanted, mask=there, compat=compat)

    hooks = [
        model.register_forward_pre_hook(see_prompt, with_kwargs=True),
        model.get_decoder().register_forward_pre_hook(mark, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
