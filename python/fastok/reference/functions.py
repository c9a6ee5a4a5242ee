"""The specification of public functions whose ops take other arguments: the functions over the ops' specifications."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class _OverSpecifications(TorchDispatchMode):
    """Inside this context, ops of fastok are what `fastok.reference` says they are, on any device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from .._library import REFERENCE

        if func.namespace == "fastok" and func._opname in REFERENCE:
            func = REFERENCE[func._opname]
        return func(*args, **(kwargs or {}))


def _specification(module: str, name: str) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        with _OverSpecifications():
            return getattr(import_module(module, __package__), name)(*args, **kwargs)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"Specification of the public ``{name}``, same arguments and result."
    _made.append((function, module))
    return function


_made: list[tuple[Callable[..., Any], str]] = []


def sign() -> None:
    """Give the functions here the signatures of the public ones, whose modules need this package to be there first."""
    for function, module in _made:
        function.__wrapped__ = getattr(import_module(module, __package__), function.__name__)  # type: ignore[attr-defined]


attention = _specification("..ops.attention", "attention")
attention_scores = _specification("..ops.attention", "attention_scores")
attention_with_scores = _specification("..ops.attention", "attention_with_scores")
attention_decode = _specification("..ops.decode", "attention_decode")
calibrate_channels = _specification("..ops.sparse", "calibrate_channels")
double_sparse_decode = _specification("..ops.double_sparse", "double_sparse_decode")
kv_pack = _specification("..caches.packed", "kv_pack")
label_scores = _specification("..ops.sparse", "label_scores")
rotary_channels = _specification("..ops.sparse", "rotary_channels")
select_tokens = _specification("..ops.sparse", "select_tokens")
