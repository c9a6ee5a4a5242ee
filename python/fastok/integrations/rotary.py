"""A model's own rotary embedding, for caches that keep keys without it."""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

FIXED = "a rotary embedding whose frequencies do not depend on the length, with one position per token"


@dataclass
class Rotary:
    """How one decoder places tokens.

    Attributes:
        embedding: its module that makes cosines and sines of positions.
    """

    embedding: nn.Module

    @classmethod
    def of(cls, model: nn.Module) -> "Rotary":
        """The one of a transformers model. TypeError if it has none or several."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a transformers language model, got {type(model).__name__} {model!r}")
        found = [module for module in model.modules() if _is_decoder(module)]
        if len(found) != 1:
            raise TypeError(
                f"model must be a transformers language model with one rotary_emb, {FIXED}; got {type(model).__name__} "
                f"with {len(found)}"
            )
        return cls.checked(found[0].get_submodule("rotary_emb"))

    @classmethod
    def calling(cls) -> "Rotary":
        """The one of the decoder in whose forward this is called.

        transformers tells a cache neither the model nor the angles by which it turned the keys. The innermost caller
        that has a ``rotary_emb`` is the decoder that uses them.
        """
        frame = sys._getframe(1)
        while frame.f_back is not None:
            frame = frame.f_back
            caller: Any = frame.f_locals.get("self")
            if _is_decoder(caller):
                return cls.checked(caller.rotary_emb)
        raise NotImplementedError(
            f"past_key_values: required, keys as they are before rotary embedding; supported, in the forward of a "
            f"decoder with a rotary_emb, {FIXED}"
        )

    @classmethod
    def checked(cls, embedding: nn.Module) -> "Rotary":
        """NotImplementedError if it cannot be undone."""
        config = getattr(embedding, "config", None)
        parameters = getattr(config, "rope_parameters", None) or {}
        for given in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
            kind = given.get("rope_type", "default")
            kind = "mrope" if "mrope_section" in given else kind
            if kind in ("dynamic", "longrope", "mrope"):
                raise NotImplementedError(f"rope_type: required, {kind!r}; supported, {FIXED}")
        return cls(embedding)

    def at(self, attention: nn.Module, position: Tensor, dtype: torch.dtype) -> "Angles":
        """The angles at ``position[B or 1,T]`` in the layer ``attention``, with cosines and sines as in ``dtype``."""
        function = turning_function(attention)
        if function is None:
            return Angles(None, position, position)
        options = {}
        if "layer_type" in inspect.signature(type(self.embedding).forward).parameters:
            options["layer_type"] = (
                getattr(attention, "layer_type", None)
                or attention.config.layer_types[  # type: ignore
                    attention.layer_idx  # type: ignore[index]
                ]
            )
        cos, sin = self.embedding(position.new_empty(1, dtype=dtype), position, **options)
        return Angles(function, cos.float(), sin.float())


@dataclass
class Angles:
    """Cosines and sines ``[B or 1,T,R]`` and the model's function that turns by them; None where it turns nothing."""

    function: Callable[..., Any] | None
    cos: Tensor
    sin: Tensor

    def turn(self, x: Tensor) -> Tensor:
        """fp32 ``x[B,G,T,D]`` turned."""
        return self._turned(x, self.cos, self.sin)

    def undo(self, x: Tensor) -> Tensor:
        """The fp32 tensor that `turn` makes ``x[B,G,T,D]`` of: exactly that, up to fp32's rounding.

        In half precision cosine and sine are no longer those of one angle, and models can scale them besides: hence
        the inverse of the matrix that was used, not a rotation back.
        """
        square = self.cos**2 + self.sin**2
        return self._turned(x, self.cos / square, -self.sin / square)

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x.float()
        if self.function is None:
            return x
        width = cos.shape[-1]
        turned = self.function(x[..., :width], x[..., :width], cos, sin)[0]
        return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], -1)


def _is_decoder(caller: object) -> bool:
    return isinstance(caller, nn.Module) and isinstance(getattr(caller, "rotary_emb", None), nn.Module)


def turning_function(attention: nn.Module) -> Callable[..., Any] | None:
    """What the forward of an attention layer turns queries and keys with; None for a layer without positions."""
    if not getattr(attention, "use_rope", True):
        return None
    forward = inspect.unwrap(type(attention).forward)
    function = forward.__globals__.get("apply_rotary_pos_emb")
    if function is None:
        raise NotImplementedError(
            f"past_key_values: required, the rotary embedding of {type(attention).__name__}; supported, layers that "
            "call apply_rotary_pos_emb"
        )
    return function
