"""Giving modules other methods for a while, and giving them back."""

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

from torch import nn

Methods = Callable[[Any], dict[str, Any]]
"""From the class to be extended to the methods to be replaced, which find their state in ``self._fastok``."""


@cache
def _extended(base: Any, methods: Methods) -> type[nn.Module]:
    """A subclass of ``base`` that passes for it. One per pair, so that compiled code is found again."""
    namespace = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), namespace | methods(base))


class Swaps:
    """Modules whose class was replaced by a subclass with other methods.

    The class is what is swapped, rather than ``forward`` on the instance or hooks added, because then ``torch.compile``
    sees a plain module (and notices the change), the call takes the fast path of ``nn.Module``, gradient checkpointing
    of transformers stays in force, and copies of the model get copies of the state.
    """

    def __init__(self) -> None:
        self._undo: list[tuple[nn.Module, Any]] = []

    def swap(self, module: nn.Module, state: object, methods: Methods) -> None:
        """Give ``module`` these methods and ``state`` as its attribute ``_fastok``.

        Raises:
            ValueError: the module has been swapped already.
            TypeError: another library has replaced its ``forward``, which would hide ours.
        """
        check_free(module)
        if "forward" in vars(module):
            raise TypeError(
                f"a {type(module).__name__} had its forward replaced (by accelerate or another library), which would "
                "hide the reducer; apply the reducer before that"
            )
        base: Any = type(module)
        module.__class__ = _extended(base, methods)
        vars(module)["_fastok"] = state
        self._undo.append((module, base))

    def restore(self) -> None:
        """Make all modules what they were."""
        while self._undo:
            module, base = self._undo.pop()
            module.__class__ = base
            del vars(module)["_fastok"]


def check_free(module: nn.Module) -> None:
    """ValueError if ``module`` has been swapped already."""
    if "_fastok" in vars(module):
        raise ValueError("a reducer is applied to this model already; call remove() on its handle first")


def replaced(**methods: Callable[..., Any]) -> Methods:
    """Methods that do not depend on the class they replace."""

    def constant(base: Any) -> dict[str, Callable[..., Any]]:
        return dict(methods)

    return constant


def calls(method: Any, name: str) -> bool:
    """Whether a method's body looks up the global or attribute ``name``."""
    code = getattr(method, "__code__", None)
    return code is not None and name in code.co_names


def rebound(method: Any, **names: object) -> Callable[..., Any]:
    """The same code with other meanings of some of the global names in it.

    So a module's forward is kept, whatever version of the library it is from, and calls another function in one place.
    """
    # Without __name__, torch.compile looks globals up in this dictionary, not in the module of that name.
    scope = {name: value for name, value in method.__globals__.items() if name != "__name__"} | names
    copy = FunctionType(method.__code__, scope, method.__name__, method.__defaults__, method.__closure__)
    copy.__kwdefaults__ = method.__kwdefaults__
    return copy
