"""Which vision-language models of transformers are supported, and putting a reducer into one."""

import sys
from typing import Any

from torch import nn

from ..reducers.context import Reducer
from . import llava, qwen_vl
from .session import acts_behind, check_needs
from .swap import Swaps
from .vlm import SHOWN, PromptSession, core_methods, head_methods

LIBRARY = "transformers, vision and language"
FAMILIES: tuple[Any, ...] = (*llava.FAMILIES, *qwen_vl.FAMILIES)
SUPPORTED = tuple(family.head for family in FAMILIES)


def family_of(module: nn.Module) -> Any:
    """The family of a vision-language model without its language-modelling head, if it is supported."""
    for family in FAMILIES:
        if _is(module, family.module, family.core):
            return family
    return None


def patch(model: nn.Module, core: Any, reducer: Reducer, swaps: Swaps, place: str | None = None) -> PromptSession:
    """Put ``reducer`` behind the vision tower of ``core``, which is within ``model``, or into the tower's layers.

    ``place`` is ``"layers"`` or ``"output"``; None: in layers for a method that says in which it reduces, unless that
    is always the last.
    """
    if place not in (None, "layers", "output"):
        raise ValueError(f"place must be 'layers' or 'output', got {place!r}")
    if place is None:
        place = "layers" if hasattr(reducer, "reduces") and not acts_behind(reducer) else "output"
    kind = family_of(core)
    if place == "output":
        check_needs(reducer, "before a language model", SHOWN)
    family = kind(core, reducer if place == "output" else NothingNeeded())
    session = PromptSession(reducer, family)
    swaps.swap(core, session, core_methods(kind))
    family.swap(core, swaps)
    if place == "layers":
        family.reduce_in_layers(core, reducer, swaps)
        session.traces = False
    for module in model.modules():
        if _is(module, kind.module, kind.head) and module.model is core:
            swaps.swap(module, session, head_methods)
    return session


class NothingNeeded:
    """In the place of a reducer behind the tower, where the tower reduces."""

    needs = ()


def _is(module: nn.Module, source: str, name: str) -> bool:
    found = sys.modules.get(f"transformers.models.{source}")
    return found is not None and isinstance(module, getattr(found, name))
