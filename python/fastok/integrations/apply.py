"""`fastok.apply`: find the encoder in a model and put a reducer into it."""

from typing import Any

from torch import nn

from ..reducers.context import Reducer
from . import timm, transformers
from .handle import Handle
from .session import SCORES
from .swap import Swaps

_LIBRARIES = (timm, transformers)
_SHOWN = ("hidden", "keys", "size", *SCORES)
"""Fields of `TokenContext`, and scores, that an encoder's layers can fill in."""


def apply(model: nn.Module, reducer: Reducer, **where: Any) -> Handle:
    """Reduce tokens in every layer of a vision transformer, between the attention residual and the MLP.

    Args:
        model: a supported encoder, or any module that contains exactly one.
        reducer: for instance ``fastok.reducers.ToMe(r=16)``.
        where: for reducers that act at a place of choice; the ones supported here take nothing.

    Returns:
        A `Handle`. ``with fastok.apply(model, reducer) as handle: …`` undoes it at the end, exactly, errors or not.

    Raises:
        TypeError: no supported encoder in the model (the message lists those supported), an encoder with blocks that
            cannot be reduced, or something that is no reducer.
        ValueError: several encoders (give the one you mean), or one that has a reducer already.
        NotImplementedError: the reducer needs something that these layers cannot show it.

    The model keeps its weights, hooks and attributes. Class, distillation and register tokens are protected. Merged
    tokens carry their size, in fp32: with the reducer's ``prop_attn``, attention (and an attention-pooling head) adds
    log(size) to their logits, and average-pooling heads count each token as often as its size. Keys are compared before
    rotary embedding, of which a merged token keeps the row of its lowest original position. Training works, also with
    gradient checkpointing (one forward per backward, or an error); so does ``torch.compile(fullgraph=True)``, where
    nothing is recorded in the handle. Layers share state: threads must not share a model.
    """
    needs = getattr(reducer, "needs", None)
    if needs is None or not callable(reducer) or isinstance(reducer, type):
        raise TypeError(f"reducer must be a reducer such as fastok.reducers.ToMe(r=16), got {reducer!r}")
    if where:
        raise TypeError(f"{type(reducer).__name__} takes no place to act at, got {', '.join(where)}")
    missing = [name for name in needs if name not in _SHOWN]
    if missing:
        raise NotImplementedError(
            f"{type(reducer).__name__} in an encoder's layers: required {', '.join(needs)}; "
            f"supported {', '.join(_SHOWN)}; missing {', '.join(missing)}"
        )
    library, encoder = _find(model)
    swaps = Swaps()
    try:
        return Handle(library.patch(model, encoder, reducer, swaps), swaps)
    except BaseException:
        swaps.restore()
        raise


def _find(model: nn.Module) -> tuple[Any, nn.Module]:
    """The one supported encoder in ``model``, and the integration that knows it."""
    found = [
        (library, name, module)
        for name, module in model.named_modules()
        for library in _LIBRARIES
        if library.is_encoder(module)
    ]
    if not found:
        supported = "; ".join(f"{library.LIBRARY}: {', '.join(library.SUPPORTED)}" for library in _LIBRARIES)
        raise TypeError(f"no supported encoder in {type(model).__name__}; supported are {supported}")
    if len(found) > 1:
        names = ", ".join(f"{name or 'the model itself'} ({type(module).__name__})" for _, name, module in found)
        raise ValueError(f"{type(model).__name__} contains several encoders, give apply one of them: {names}")
    library, _, encoder = found[0]
    return library, encoder
