"""What a reducer leaves of a photo in a vision-language checkpoint: ``fastok viz IMAGE --model CHECKPOINT``."""

import ast
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor

from .. import reducers, viz
from ..reducers.context import Reducer
from . import vision_language
from .apply import apply


def reducer_of(text: str) -> Reducer:
    """The reducer that ``text`` makes, such as ``"DivPrune(keep=64)"`` or ``"FasterVLM"``; arguments are literals.

    Raises:
        ValueError: there is none of that name, or it does not take these arguments.
    """
    try:
        call = ast.parse(text, mode="eval").body
        call = call if isinstance(call, ast.Call) else ast.Call(call, [], [])
        name = call.func.id if isinstance(call.func, ast.Name) else ""
        known = [name for name in reducers.__all__ if is_dataclass(getattr(reducers, name)) and name != "TokenContext"]
        if name not in known:
            raise ValueError(f"the reducers are {', '.join(known)}")
        arguments = {str(argument.arg): ast.literal_eval(argument.value) for argument in call.keywords}
        made: Reducer = getattr(reducers, name)(*map(ast.literal_eval, call.args), **arguments)
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"must be like 'DivPrune(keep=64)', got {text!r} ({error})") from None
    return made


def load(checkpoint: str) -> tuple[Any, Any]:
    """A supported model, on a GPU if there is one, and its processor.

    Raises:
        OSError: there is no such checkpoint, or its model is of another class; the message lists those supported.
    """
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    classes = config.architectures or ["a model of no class"]
    if not set(classes) & set(vision_language.SUPPORTED):
        raise OSError(f"{checkpoint} is {', '.join(classes)}; supported are {', '.join(vision_language.SUPPORTED)}")
    model = getattr(transformers, classes[0]).from_pretrained(checkpoint, dtype="auto").eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), transformers.AutoProcessor.from_pretrained(
        checkpoint
    )


def draw(
    model: Any, processor: Any, image: Image.Image, reducer: Reducer, text: str, style: viz.Style = "mean"
) -> tuple[list[Image.Image], list[str]]:
    """What the model is shown of the image, the tokens that ``reducer`` leaves, and captions for these pictures.

    Args:
        text: what is asked about the image.

    Raises:
        OSError: the reducer cannot be applied to this model; the message says why.
    """
    try:
        handle = apply(model, reducer)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise OSError(f"{reducer} in {type(model).__name__}: {error}") from error
    with handle, torch.inference_mode():
        inputs = processor(images=image, text=_prompt(processor, text), return_tensors="pt")
        model(**inputs.to(model.device, model.dtype), logits_to_keep=1)
    (patches,) = handle.patches
    shown = _shown(image, inputs["pixel_values"], processor.image_processor)
    pictures = [viz.draw_patches(shown, slots, style=style) for slots in patches]
    names = [""] if len(patches) == 1 else ["thumbnail: ", "crops: "]
    captions = [
        f"{name}{len(slots[slots >= 0].unique())} of {slots.numel()} tokens"
        for name, slots in zip(names, patches, strict=True)
    ]
    return [shown.resize(pictures[-1].size, Image.Resampling.LANCZOS), *pictures], ["original", *captions]


def _prompt(processor: Any, text: str) -> str:
    if processor.chat_template is None:
        return f"{processor.image_token}\n{text}"
    content = [{"type": "image"}, {"type": "text", "text": text}]
    prompt: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return prompt


def _shown(image: Image.Image, pixels: Tensor, processor: Any) -> Image.Image:
    """The part of the image that the model is shown: where it is one crop ``[1,3,H,W]``, what the processor made."""
    if pixels.dim() != 4:
        return image
    mean, std = (torch.tensor(list(x))[:, None, None] for x in (processor.image_mean, processor.image_std))
    values = ((pixels[0].float().cpu() * std + mean) * 255).round().clamp(0, 255)
    return Image.fromarray(values.permute(1, 2, 0).numpy().astype(np.uint8))
