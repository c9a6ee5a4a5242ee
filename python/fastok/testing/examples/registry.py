"""The list of examples, and what examples are made of."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ... import _library, reference

Size = Literal["small", "awkward", "large"]
Arguments = tuple[Any, ...]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Example:
    """Arguments for one op, of the same shapes whatever the seed.

    Attributes:
        op: the op's name.
        size: ``"large"`` fills a GPU; the others are quick enough for a checker that slows kernels down a hundredfold.
        title: what is special about them.
        build: makes the flat arguments of ``torch.ops.fastok.<op>`` for a dtype, from torch's random state.
        copies: the op must copy an input (its last dimension is not contiguous), and so allocates more than outputs.
        flops: of the matrix product in it, if that is what takes the time.
    """

    op: str
    size: Size
    title: str
    build: Callable[[torch.dtype], Arguments]
    copies: bool = False
    flops: float = 0.0

    def arguments(self, dtype: torch.dtype, seed: int = 0) -> Arguments:
        """The same arguments for the same ``dtype`` and ``seed``, on the CPU."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build(dtype)

    @property
    def name(self) -> str:
        """What to call it in a report."""
        return f"{self.op} {self.size}: {self.title}"


EXAMPLES: dict[str, list[Example]] = {op: [] for op in _library.REFERENCE}


def example(op: str, size: Size, title: str, *, copies: bool = False, flops: float = 0.0) -> Callable[[Any], Any]:
    """Decorator: register a function from dtype to arguments as an example of ``op``."""

    def register(build: Callable[[torch.dtype], Arguments]) -> Callable[[torch.dtype], Arguments]:
        EXAMPLES[op].append(Example(op, size, title, build, copies, flops))
        return build

    return register


def examples(*sizes: Size) -> Iterator[Example]:
    """All examples of all ops, or those of the given sizes."""
    for of_op in EXAMPLES.values():
        yield from (one for one in of_op if not sizes or one.size in sizes)


def signs(*shape: int) -> Tensor:
    """±1 entries: with a width that is a power of 4 all norms and cosines are exact, so ties are ties everywhere."""
    return torch.randint(0, 2, shape).float() * 2 - 1


def odd_view(x: Tensor) -> Tensor:
    """The values of ``x[B,N,C]`` in the middle of NaN, at an odd offset and with odd strides."""
    batch, n, width = x.shape
    room = torch.full((batch, n + 1, width + 4), math.nan, dtype=x.dtype)
    room[:, 1:, 3 : width + 3] = x
    return room[:, 1:, 3 : width + 3]


def odd_width(*shape: int) -> Tensor:
    """Signs and three columns of zeros: an odd width at which cosines are still exact."""
    return torch.nn.functional.pad(signs(*shape), (0, 3))


def random_map(batch: int, n: int, n_out: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(assign, offsets, members)`` with dropped tokens, empty slots and slots of many members."""
    slots = torch.randint(-1, max(n_out, 1), (batch, n)).clamp(max=n_out - 1)
    assign = torch.where(torch.rand(batch, n) < 0.2, min(2, n_out - 1), slots).int()
    return assign, *reference.build_map(assign, n_out)
