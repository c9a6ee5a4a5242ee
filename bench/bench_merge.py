"""Matching and merging against the eager formula, and merging against a plain copy."""

import fastok
import torch
from fastok.testing.bench import Case
from rivals import tome_eager

SHAPES = [  # B, N, C, D, r, promised speed-up
    (8, 577, 1024, 64, 23, 4.0),
    (8, 197, 768, 64, 16, 3.0),
    (1, 2304, 1536, 64, 1000, 2.0),
    (1, 4096, 320, 320, 2048, 1.1),
]


# What is promised on a GPU: speed-up and µs, under CUDA graphs.
CUDA_TARGETS = {((8, 197, 768, 64, 16), torch.float16): (5.0, 12.0)}


def cases(device: torch.device) -> list[Case]:
    found = []
    for dtype in (torch.float32, torch.bfloat16) if device.type == "cpu" else (torch.float16, torch.bfloat16):
        for shape in SHAPES:
            target = (shape[5], None) if device.type == "cpu" else CUDA_TARGETS.get((shape[:5], dtype), (None, None))
            found.append(step(*shape[:5], *target, dtype, device))
        for shape in SHAPES:
            found.extend(merge_alone(*shape[:5], dtype, device))
    return found


def label(what: str, batch: int, n: int, width: int, depth: int, r: int, dtype: torch.dtype) -> str:
    return f"{what} ({batch},{n},{width},{depth},{r}) {str(dtype).removeprefix('torch.')}"


def step(
    batch: int,
    n: int,
    width: int,
    depth: int,
    r: int,
    target: float | None,
    target_us: float | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Case:
    def inputs() -> tuple[torch.Tensor, torch.Tensor]:
        return (
            torch.randn(batch, n, depth, device=device).to(dtype),
            torch.randn(batch, n, width, device=device).to(dtype),
        )

    def ours():
        metric, x = inputs()
        size = torch.ones(batch, n, device=device)
        return lambda: fastok.bipartite_match(metric, r, protect=1).merge(x, size=size)

    def rival():
        metric, x = inputs()
        size = torch.ones(batch, n, 1, device=device, dtype=dtype)
        return lambda: tome_eager.match_and_merge(metric, x, size, r)

    element = torch.empty(0, dtype=dtype).element_size()
    return Case(
        label("match+merge", batch, n, width, depth, r, dtype), ours, rival, "eager formula",
        bytes_moved=batch * element * (n * depth + (2 * n - r) * width),
        flops=2.0 * batch * ((n + 1) // 2) * (n // 2) * depth, dtype=dtype, target=target,
        target_us=target_us,
    )  # fmt: skip


def merge_alone(
    batch: int, n: int, width: int, depth: int, r: int, dtype: torch.dtype, device: torch.device
) -> list[Case]:
    """Rivals: copies of input and output, the target being 1.6 times their time; harder, a copy of as many bytes."""
    metric = torch.randn(batch, n, depth, device=device).to(dtype)
    token_map = fastok.bipartite_match(metric, r, protect=1)

    def ours():
        x = torch.randn(batch, n, width, device=device).to(dtype)
        size = torch.ones(batch, n, device=device)
        return lambda: token_map.merge(x, size=size)

    def copies_of(*rows: int):
        def build():
            all_rows = [torch.randn(batch, count, width, device=device).to(dtype) for count in rows]
            return lambda: [x.clone() for x in all_rows]

        return build

    name, element = label("merge", batch, n, width, depth, r, dtype), torch.empty(0, dtype=dtype).element_size()
    moved = batch * element * (2 * n - r) * width
    return [
        Case(name, ours, copies_of(n, n - r), "copies of input and output", bytes_moved=moved, dtype=dtype,
             target=1 / 1.6),
        # As many bytes read and written as merging reads and writes.
        Case(name, ours, copies_of(n - r // 2), "copy of as many bytes", bytes_moved=moved, dtype=dtype),
    ]  # fmt: skip
