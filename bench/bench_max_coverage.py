"""Greedy facility location against the eager loop that evaluates every gain in every step."""

import fastok
import torch
from fastok.testing.bench import Case
from rivals import max_coverage_eager

SHAPES = [  # B, R, N, D, k: an image by itself, crops by text and themselves, a large image
    (1, 576, 576, 1024, 64),
    (5, 620, 576, 1024, 64),
    (1, 2880, 2880, 1024, 64),
]


def cases(device: torch.device) -> list[Case]:
    return [case(*shape, device) for shape in SHAPES]


def case(batch: int, rows: int, n: int, width: int, k: int, device: torch.device) -> Case:
    """The pair form, cosines included."""

    def inputs() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(batch, rows, width, device=device), torch.randn(batch, n, width, device=device)

    def ours():
        y, x = inputs()
        return lambda: fastok.max_coverage((y, x), k)

    def rival():
        y, x = inputs()
        return lambda: max_coverage_eager.greedy(y, x, k)

    return Case(
        f"max_coverage ({batch},{rows},{n},{width},k={k}) float32", ours, rival, "eager loop",
        flops=2.0 * batch * rows * n * width, dtype=torch.float32,
    )  # fmt: skip
