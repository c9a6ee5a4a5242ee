"""Differentiable ops: past torch.library's Python layer where no gradient is asked for, and no gradient twice."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def call(op: Callable[..., Any], *args: Any) -> Any:
    """``op(*args)``, for an op with a formula registered by ``torch.library.register_autograd``.

    That formula is a Python function, which every call passes through, with a gradient to come or without. Beside small
    inputs and cold caches it costs as much as the work, so calls that need no gradient go below it.
    """
    if torch.compiler.is_compiling():
        return op(*args)
    if torch.is_grad_enabled():
        for x in args:
            if isinstance(x, Tensor) and x.requires_grad:
                return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def only_once(op: str) -> None:
    """Have a gradient through ``op``, which makes gradients, end in an error: it would be wrong."""

    def refuse(ctx: Any, *grads: Tensor) -> None:
        name = op.removeprefix("fastok::").removesuffix("_backward")
        raise NotImplementedError(
            f"{name}: required, a gradient of its gradient (create_graph=True); supported, gradients of first order"
        )

    torch.library.register_autograd(op, refuse)


def without_gradient(x: Tensor) -> Tensor:
    """``x``, for an op that is not differentiable."""
    return x.detach() if x.requires_grad else x
