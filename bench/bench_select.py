"""Selection against what one writes in PyTorch."""

from collections.abc import Callable
from typing import Any

import fastok
import torch
from fastok.testing.bench import Case
from rivals import select_eager

TOP = [(64, 576, 64), (1, 65536, 4096), (16, 2880, 288)]  # B, N, k
SAMPLE = [(64, 197, 197), (8, 1024, 512)]
PEAKS = [(8, 196, 768, 32, 5), (8, 576, 1024, 64, 5), (1, 2880, 1024, 288, 7)]  # B, N, D, k, neighbors


def cases(device: torch.device) -> list[Case]:
    found = [top_tokens(*shape, device) for shape in TOP]
    found += [sample_cdf(*shape, device) for shape in SAMPLE]
    found += [density_peaks(*shape, device) for shape in PEAKS]
    return found


def top_tokens(batch: int, n: int, k: int, device: torch.device) -> Case:
    def on(function: Callable[[torch.Tensor, int], Any]) -> Callable[[], Callable[[], Any]]:
        def build() -> Callable[[], Any]:
            scores = torch.rand(batch, n, device=device)
            return lambda: function(scores, k)

        return build

    return Case(
        f"top_tokens ({batch},{n}), k={k}", on(fastok.top_tokens), on(select_eager.top_tokens), "topk and sort",
        bytes_moved=batch * (4 * n + 8 * k), target=1.0,
    )  # fmt: skip


def sample_cdf(batch: int, n: int, k: int, device: torch.device) -> Case:
    def on(function: Callable[[torch.Tensor, int], Any]) -> Callable[[], Callable[[], Any]]:
        def build() -> Callable[[], Any]:
            scores = torch.randn(batch, n, device=device).softmax(1)
            return lambda: function(scores, k)

        return build

    return Case(
        f"sample_cdf ({batch},{n}), k={k}", on(fastok.sample_cdf), on(select_eager.sample_cdf), "eager formula",
        bytes_moved=batch * 4 * (3 * n + min(k, n)),
    )  # fmt: skip


def density_peaks(batch: int, n: int, width: int, k: int, neighbors: int, device: torch.device) -> Case:
    def tokens() -> torch.Tensor:
        return torch.randn(batch, n, width, device=device)

    def ours() -> Callable[[], Any]:
        x = tokens()
        return lambda: fastok.density_peaks(x, k, neighbors=neighbors)

    def rival() -> Callable[[], Any]:
        x = tokens()
        return lambda: select_eager.density_peaks(x, k, neighbors)

    return Case(
        f"density_peaks ({batch},{n},{width}), k={k}, neighbors={neighbors}", ours, rival, "eager cdist",
        bytes_moved=batch * 4 * n * width, flops=2.0 * batch * n * n * width, target=1.0,
    )  # fmt: skip
