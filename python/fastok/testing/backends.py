"""One test, every backend: reference, cpu (each instruction set), triton-interpreter, cuda-on-host, cuda.

A test that takes a :class:`Backend` calls ``backend.merge(x, assign, …)`` with the flat signature of
``torch.ops.fastok.merge`` and CPU tensors; results come back as CPU tensors.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch

from .. import _library, triton
from .examples import moved

Function = Callable[..., Any]


@dataclass(frozen=True)
class Backend:
    """A way to run the ops: attribute access gives the op, e.g. ``backend.merge``."""

    name: str
    device: str
    resolve: Callable[[str], Function]
    isa: str | None = None

    def __getattr__(self, op: str) -> Function:
        if op not in _library.REFERENCE:
            raise AttributeError(op)
        function = self.resolve(op)

        def call(*args: Any) -> Any:
            here = moved(args, self.device)
            _poison(here)
            with _isa(self.isa):
                result = function(*here)
            if result is None:  # written to the first argument
                return here[0].cpu()
            if isinstance(result, torch.Tensor):
                return result.cpu()
            return tuple(part.cpu() for part in result)

        return call

    def __repr__(self) -> str:
        return self.name


def _poison(args: tuple[Any, ...]) -> None:
    """Leave NaN in freed memory of the sizes about to be asked for, so that an unwritten output shows."""
    for arg in args:
        if isinstance(arg, torch.Tensor) and arg.numel() > 0:
            torch.full((arg.numel(),), -(2**31) + 1, dtype=torch.int32, device=arg.device)
            torch.full((arg.numel(),), float("nan"), dtype=torch.float32, device=arg.device)


@contextmanager
def _isa(isa: str | None) -> Iterator[None]:
    if isa is None:
        yield
        return
    native = importlib.import_module("fastok._native")
    before = native.active_isa()
    native.set_isa(isa)
    try:
        yield
    finally:
        native.set_isa(before)


def _reference(op: str) -> Function:
    return cast(Function, _library.REFERENCE[op])


def _native(op: str) -> Function:
    return getattr(torch.ops.fastok, op)


def _triton(op: str) -> Function:
    return triton.OPS[op]


_extra: dict[str, Callable[[str], Function]] = {}


def register_backend(name: str, resolve: Callable[[str], Function]) -> None:
    """Add a backend on CPU tensors, found by :func:`over_backends` from then on (the CUDA-on-host harness does)."""
    _extra[name] = resolve


def available_backends(op: str) -> list[tuple[Backend, str | None]]:
    """Every backend that has ``op`` with None, or with the reason why it cannot run here."""
    found: list[tuple[Backend, str | None]] = [(Backend("reference", "cpu", _reference), None)]
    found.append((Backend("cpu", "cpu", _native), None))
    if importlib.util.find_spec("fastok._native") is not None:
        native = importlib.import_module("fastok._native")
        found += [(Backend(f"cpu-{isa}", "cpu", _native, isa), None) for isa in native.available_isas()[:-1]]
    if op in triton.OPS:
        reason = None
        if importlib.util.find_spec("triton") is None:
            reason = "Triton is not installed"
        elif os.environ.get("TRITON_INTERPRET") != "1":
            reason = "TRITON_INTERPRET=1 is not set"
        found.append((Backend("triton-interpreter", "cpu", _triton), reason))
    host = _extra.get("cuda-on-host")
    found.append((Backend("cuda-on-host", "cpu", host or _native), None if host else "the harness was not built"))
    cuda = torch.cuda.is_available()
    found.append((Backend("cuda", "cuda", _native), None if cuda else "no GPU"))
    return found


def over_backends(op: str, *, without: tuple[str, ...] = ()) -> Any:
    """Decorator: run the test once per backend that serves ``op``, as its argument ``backend``."""
    import pytest

    params = [
        pytest.param(
            backend,
            id=backend.name,
            marks=pytest.mark.skipif(reason is not None, reason=f"{backend.name}: {reason}"),
        )
        for backend, reason in available_backends(op)
        if backend.name not in without
    ]
    return pytest.mark.parametrize("backend", params)
