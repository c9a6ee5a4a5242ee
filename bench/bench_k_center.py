"""Greedy k-center selection against the greedy loop over the matrix of all distances.

A video's size, at which that matrix would take 17 GB, is k_center_video.py's, as one call of the rival takes a minute.
"""

import fastok
import torch
from fastok.testing.bench import Case
from rivals import k_center_eager

SHAPES = [  # B, N, D, k, promised speed-up
    (1, 576, 1024, 58, 2.0),
    (16, 576, 1024, 58, 4.0),
    (1, 2880, 4096, 288, 3.0),
    (1, 16384, 3584, 1024, 4.0),
]
# What is promised on a GPU: speed-up and µs, under CUDA graphs.
CUDA_TARGETS = {(1, 576, 1024, 58): (20.0, 150.0)}


def cases(device: torch.device) -> list[Case]:
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cpu" else (torch.float16,)
    found = [case(*shape, dtype, device) for dtype in dtypes for shape in SHAPES[:3]]
    return [*found, case(*SHAPES[3], dtypes[0], device)]


def case(
    batch: int,
    n: int,
    width: int,
    k: int,
    promised: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Case:
    """One shape; start and objective as published with DivPrune."""

    def inputs() -> torch.Tensor:
        return torch.randn(batch, n, width, device=device).to(dtype)

    def ours():
        x = inputs()
        return lambda: fastok.k_center(x, k)

    def rival():
        x = inputs()
        return lambda: k_center_eager.gram_greedy(x, k)

    on_cpu = promised if dtype == torch.float32 else None
    target, target_us = (on_cpu, None) if device.type == "cpu" else CUDA_TARGETS.get((batch, n, width, k), (None, None))
    return Case(
        f"k_center ({batch},{n},{width},k={k}) {str(dtype).removeprefix('torch.')}", ours, rival,
        "eager loop over the matrix",
        flops=2.0 * batch * n * n * width, dtype=dtype, target=target, target_us=target_us,
    )  # fmt: skip
