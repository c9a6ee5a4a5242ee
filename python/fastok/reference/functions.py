"""The specification of public functions whose ops take other arguments: the functions over the ops' specifications."""

from collections.abc import Callable
from importlib import import_module
from inspect import signature
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class _OverSpecifications(TorchDispatchMode):
    """Inside this context, ops of fastok are what `fastok.reference` says they are, on any device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from .._library import REFERENCE

        if func.namespace == "fastok" and func._opname in REFERENCE:
            func = REFERENCE[func._opname]
        return func(*args, **(kwargs or {}))


_all: list[tuple[Callable[..., Any], Callable[[], Callable[..., Any]]]] = []


def _specification(module: str, name: str) -> Callable[..., Any]:
    def public() -> Callable[..., Any]:
        return getattr(import_module(module, __package__), name)

    def function(*args: Any, **kwargs: Any) -> Any:
        with _OverSpecifications():
            return public()(*args, **kwargs)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"Specification of the public ``{name}``, same arguments and result."
    _all.append((function, public))
    return function


def adopt_signatures() -> None:
    """Of the public functions, once there are any: they are imported after their ops' specifications."""
    for function, public in _all:
        function.__signature__ = signature(public())  # type: ignore[attr-defined]


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
semantic_tokens = _specification("..caches.semantic", "semantic_tokens")
