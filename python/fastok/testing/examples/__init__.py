"""Example inputs of every op, from small to large: what is repeated, captured, compiled, sanitized and timed.

A new op joins by a few :func:`example` functions in the file of its family. Inputs are made on the CPU, so that a
device receives them by copies alone. Similarities are exact in every dtype, so that matches can be compared bitwise
however they were computed; sums are compared by their accuracy.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from ... import _library
from ..compare import assert_accurate, assert_same
from . import attention, cache
from . import k_center as k_center
from . import match as match
from . import max_coverage as max_coverage
from . import merge as merge
from . import select as select
from . import sparse as sparse
from .registry import DTYPES, EXAMPLES, Arguments, Example, Size, example, examples

__all__ = [
    "DTYPES", "EXAMPLES", "Arguments", "Example", "Size", "example", "examples", "moved", "outputs", "verify",
]  # fmt: skip

# What rounding once on the way may change: of ops whose kernels round where their specification, in fp32, does not.
ROUNDING: dict[str, Callable[..., tuple[Tensor | None, ...]]] = {
    "attention": attention.rounding_of_attention,
    "attention_backward": attention.rounding_of_backward,
    "attention_scores": attention.rounding_of_scores,
    "attention_with_scores": attention.rounding_of_both,
    "decode": cache.rounding_of_decode,
    "decode_packed": cache.rounding_of_decode_packed,
    "double_sparse_decode": sparse.rounding_of_double_sparse_decode,
}


def moved(arguments: Arguments, device: str | torch.device) -> Arguments:
    """``arguments`` on ``device`` with their strides and offsets: ``Tensor.to`` makes views contiguous."""

    def move(x: Tensor) -> Tensor:
        whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
        return whole.to(device).as_strided(x.shape, x.stride(), x.storage_offset())

    return tuple(move(x) if isinstance(x, Tensor) else x for x in arguments)


def outputs(result: Tensor | tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    """An op's result as a tuple; empty for an op that writes to its arguments."""
    if result is None:
        return ()
    return (result,) if isinstance(result, Tensor) else tuple(result)


def verify(op: str, arguments: Arguments, result: Tensor | tuple[Tensor, ...]) -> None:
    """AssertionError unless ``result`` is what the specification gives for ``arguments``, all on the CPU.

    Floats may err twice as much against fp64 as the specification does in their dtype, and by ``ROUNDING``.
    """
    specification = cast(Callable[..., Any], _library.REFERENCE[op])
    doubled = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]
    wanted, truth = outputs(specification(*arguments)), outputs(specification(*doubled))
    floors = ROUNDING[op](*arguments) if op in ROUNDING else (None,) * len(truth)
    for place, (got, peer, exact, floor) in enumerate(zip(outputs(result), wanted, truth, floors, strict=True)):
        if got.is_floating_point():
            assert_accurate(got, exact, peer, floor=floor, name=f"{op}'s result {place}")
        else:
            assert_same(got, peer, f"{op}'s result {place}")
