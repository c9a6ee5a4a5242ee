"""What a call of a reduced vision-language model must fulfil, and where the images in its prompts are."""

from typing import Any

import torch
from torch import Tensor

from .prompt import History


def check_call(given: dict[str, Any], options: dict[str, Any], batch: int, seen: int, width: int) -> None:
    """Error if the mask, or what else counts tokens, is not of the prompt as it was."""
    mask = given.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        what = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise NotImplementedError(f"attention_mask: required, {what}; supported, [B,S] with 0 for padding")
    if mask is not None and mask.shape[1] != seen + width:
        raise ValueError(
            f"attention_mask must be of the tokens of the prompt as it was before images were reduced, "
            f"[{batch}, {seen + width}] after {seen} earlier ones, got {list(mask.shape)}. Where generate makes it, "
            "apply the reducer to the whole model, with its language-modelling head"
        )
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if options.get(name) is not None:
            raise NotImplementedError(
                f"{name}: required, packed prompts whose lengths were counted before images were reduced; supported, "
                "one prompt per row"
            )


def check_positions(core: Any, positions: Tensor | None, history: History, seen: int) -> None:
    """ValueError if what continues a shortened cache starts again with tokens that are in it."""
    if positions is None or (positions.dim() == 3 and positions.shape[0] not in (1, 4)):
        return
    if positions.dim() == 3:  # M-RoPE: a first row that counts tokens, or one for all axes, with the model's offset
        offset = 0 if core.rope_deltas is None or positions.shape[0] == 4 else core.rope_deltas
        positions = positions[0] - offset
    visible = history.places if history.mask is None else (history.mask != 0).sum(1)
    next_one = visible + history.removed.to(positions.device) + seen - history.columns
    again = int((next_one - positions[:, 0]).max())
    if again > 0:
        raise ValueError(
            f"input_ids must be the tokens behind the {seen} that past_key_values stands for, but position_ids say "
            f"that {again} of them come again: the caller of {type(core).__name__} took the cache's length for theirs. "
            "Apply the reducer to the whole model, with its language-modelling head, or give it the new tokens only"
        )


def with_visuals(features: Any) -> list[Tensor]:
    """The features of each image, which carry a `Visual`."""
    if isinstance(features, Tensor):
        rows = list(features)
        for row, visual in zip(rows, getattr(features, "_fastok", ()), strict=False):
            row._fastok = visual
    else:
        rows = list(features)
    if not all(hasattr(row, "_fastok") for row in rows):
        raise NotImplementedError(
            "mm_encoder_outputs: required, image features that carry what the reducer is to be shown; supported, those "
            "of the model's get_image_features or get_video_features while the reducer is applied, whole and on the "
            "same device; missing for others, and for generate with prefill_chunk_size"
        )
    return rows


def starts(name: str, placeholders: Tensor, images: list[Tensor]) -> list[tuple[int, int]]:
    """Row and column where each image's placeholders begin, which fill ``placeholders[B,S]`` in this order."""
    width = placeholders.shape[1]
    places = placeholders.flatten().nonzero()[:, 0]
    lengths = torch.tensor([len(image) for image in images])
    total = int(lengths.sum())
    if len(places) != total:
        raise ValueError(
            f"the prompts have {len(places)} {name} placeholders for {len(images)} {name}s of {total} tokens: "
            f"processor and model disagree (patch_size, image size, vision_feature_select_strategy), or {name}s are "
            "missing"
        )
    ends = lengths.cumsum(0).to(places.device)
    first, last = torch.stack([places[ends - lengths.to(places.device)], places[ends - 1]]).tolist()
    for begin, end, length in zip(first, last, lengths.tolist(), strict=True):
        if end - begin != length - 1 or begin // width != end // width:
            raise ValueError(
                f"the {length} placeholders of one {name} are not side by side in one prompt: processor and model "
                "disagree on how many tokens it makes"
            )
    return [(begin // width, begin % width) for begin in first]
