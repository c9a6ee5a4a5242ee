"""Stage 8: the Triton kernels, compiled for this GPU instead of interpreted, against the specification."""

from functools import partial
from itertools import islice

import torch
from fastok import triton
from fastok.testing.examples import DTYPES, Example, examples, moved, outputs, verify

from .device import attempt
from .record import Record


def run(record: Record, device: str = "cuda", limit: int | None = None) -> None:
    count = 0
    for example in islice((one for one in examples("small", "awkward") if one.op in triton.OPS), limit):
        for dtype in DTYPES:
            count += attempt(record, f"{example.name}, {dtype}", partial(check, example, dtype, device))
            record.update(f"{count} inputs right, {len(record.failures)} wrong")


def check(example: Example, dtype: torch.dtype, device: str) -> None:
    """AssertionError unless the kernel gives what the specification does."""
    arguments = example.arguments(dtype)
    results = outputs(triton.OPS[example.op](*moved(arguments, device)))
    verify(example.op, arguments, tuple(part.cpu() for part in results))
