"""Which vision-language models of transformers are supported, and putting a reducer into one."""

import sys
from typing import Any

from torch import nn

from ..reducers.context import Reducer
from . import llava, qwen_vl
from .swap import Swaps
from .tower import is_score
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


def patch(model: nn.Module, core: Any, reducer: Reducer, swaps: Swaps) -> PromptSession:
    """Put ``reducer`` between the vision tower and the language model of ``core``, which is within ``model``."""
    missing = [name for name in reducer.needs if name not in SHOWN and not is_score(name)]
    if missing:
        raise NotImplementedError(
            f"{type(reducer).__name__} before a language model: required, {', '.join(reducer.needs)}; supported, "
            f"{', '.join(SHOWN)}; missing, {', '.join(missing)}"
        )
    kind = family_of(core)
    family = kind(core, reducer)
    session = PromptSession(reducer, family, family.tower)
    swaps.swap(core, session, core_methods(kind))
    family.swap(core, swaps)
    for module in model.modules():
        if _is(module, kind.module, kind.head) and module.model is core:
            swaps.swap(module, session, head_methods)
    return session


def _is(module: nn.Module, source: str, name: str) -> bool:
    found = sys.modules.get(f"transformers.models.{source}")
    return found is not None and isinstance(module, getattr(found, name))
