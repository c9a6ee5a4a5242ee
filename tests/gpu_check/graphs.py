"""Stage 6: every op captured in a CUDA graph, replayed on other contents, and held to its promises.

Compared bitwise with eager runs. An op never waits for the device. It allocates its outputs and nothing else, unless it
must copy an input or its kernels hand each other results (`WORKING_MEMORY`: torch's allocator serves captures too).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from fastok.testing.examples import DTYPES, Arguments, Example, examples, moved, outputs
from torch import Tensor

from .device import attempt, has_kernel
from .record import Record

WORKING_MEMORY = {
    "attention", "attention_backward", "attention_scores", "decode", "decode_packed", "density_peaks",
    "double_sparse_decode", "k_center", "label_tokens", "max_coverage", "sample_cdf", "select_tokens", "top_tokens",
}  # fmt: skip


def run(record: Record) -> None:
    count = 0
    record.update(without_kernel=sorted({example.op for example in examples() if not has_kernel(example.op, "cuda")}))
    for example in (example for example in examples() if has_kernel(example.op, "cuda")):
        for dtype in DTYPES:
            count += attempt(record, f"{example.name}, {dtype}", partial(check, example, dtype))
            record.update(f"{count} inputs captured and replayed, {len(record.failures)} problems")


def check(example: Example, dtype: torch.dtype) -> None:
    """AssertionError unless an op keeps its promises in a graph."""
    op = getattr(torch.ops.fastok, example.op)
    static, other = (moved(example.arguments(dtype, seed), "cuda") for seed in (0, 1))
    expected = [clones(op(*arguments)) for arguments in (static, other)]
    with forbidden_sync():
        before = allocations()
        held = outputs(op(*static))
        extra = allocations() - before - sum(part.numel() > 0 for part in held)
    may_allocate = example.copies or example.op in WORKING_MEMORY
    assert extra == 0 or may_allocate, f"{extra} allocations besides its outputs"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outputs(op(*static))
    for name, contents, wanted in (("the captured", None, expected[0]), ("other", other, expected[1])):
        if contents is not None:
            copy_contents(contents, static)
        for part in captured:
            part.view(torch.uint8).fill_(0xA5)
        graph.replay()
        same = all(same_bits(*pair) for pair in zip(captured, wanted, strict=True))
        assert same, f"a replay on {name} contents differs from an eager run"


def clones(result: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [part.clone() for part in outputs(result)]


def same_bits(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


def copy_contents(source: Arguments, target: Arguments) -> None:
    for new, old in zip(source, target, strict=True):
        if isinstance(old, Tensor):
            old.copy_(new)


def allocations() -> int:
    """How many blocks torch has handed out so far."""
    return int(torch.cuda.memory_stats()["allocation.all.allocated"])


@contextmanager
def forbidden_sync() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
