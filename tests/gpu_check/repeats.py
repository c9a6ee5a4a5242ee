"""Stage 5: every op many times on the same input, compared bitwise, its output memory poisoned in between.

Every other repeat runs beside a copy on another stream, so that blocks do not always run in the same order.
"""

from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

import torch
from fastok.testing.examples import DTYPES, Arguments, Example, examples, moved, outputs

from .device import attempt, has_kernel
from .record import Record

REPEATS = 1000


def run(record: Record, device: str = "cuda", repeats: int = REPEATS, limit: int | None = None) -> None:
    count = 0
    own = (example for example in examples("awkward", "large") if has_kernel(example.op, device))
    for example in islice(own, limit):
        for dtype in DTYPES:
            count += attempt(record, f"{example.name}, {dtype}", partial(check, example, dtype, device, repeats))
            record.update(f"{count} inputs x {repeats} repeats stable, {len(record.failures)} not")


def check(example: Example, dtype: torch.dtype, device: str, repeats: int) -> None:
    """AssertionError unless all repeats give the same bits."""
    op = getattr(torch.ops.fastok, example.op)
    different = differing(op, moved(example.arguments(dtype), device), device, repeats)
    assert not different, f"{len(different)} of {repeats} repeats differ from the first run, first {different[0]}"


def differing(op: Callable[..., Any], arguments: Arguments, device: str, repeats: int) -> list[int]:
    """Which repeats gave other bits than the first run."""
    expected = [part.contiguous().view(torch.uint8) for part in outputs(op(*arguments))]
    different = torch.zeros(repeats, dtype=torch.bool, device=device)
    noise = Noise(device)
    for repeat in range(repeats):
        if repeat % 2:
            noise.start()
        for part, first in zip(outputs(op(*arguments)), expected, strict=True):
            raw = part.contiguous().view(torch.uint8)
            different[repeat] |= (raw != first).any()
            # The allocator hands this memory to the next run: what that leaves unwritten then differs.
            raw.fill_(0xA5 if repeat % 4 < 2 else 0xFF)
    return different.nonzero().flatten().tolist()


class Noise:
    """A copy on another stream; nothing on a device without streams."""

    def __init__(self, device: str) -> None:
        self.stream = torch.cuda.Stream() if device == "cuda" else None
        self.source = torch.ones(1 << 22, device=device)
        self.target = torch.empty_like(self.source)

    def start(self) -> None:
        if self.stream is not None:
            with torch.cuda.stream(self.stream):
                self.target.copy_(self.source)
