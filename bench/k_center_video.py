"""k_center at a video's size, once against the chunked eager loop (a minute), and the memory that ours takes.

python bench/k_center_video.py
"""

import resource
import time
from collections.abc import Callable

import fastok
import torch
from rivals import k_center_eager

SHAPE, K = (1, 65536, 1152), 4096


def seconds(function: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def peak_gb() -> float:
    """The most memory this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> None:
    """Ours first, so that its memory is not the rival's."""
    x = torch.randn(SHAPE)
    fastok.k_center(x[:, :512], 10)
    before = peak_gb()
    ours = seconds(lambda: fastok.k_center(x, K))
    print(f"k_center {SHAPE}, k={K}, {torch.get_num_threads()} threads: {ours:.2f} s, ", end="", flush=True)
    print(f"process {peak_gb():.2f} GB at most ({before:.2f} before)", flush=True)
    rival = seconds(lambda: k_center_eager.chunked_greedy(x, K))
    print(f"chunked eager loop: {rival:.2f} s, {rival / ours:.1f} times as long")


if __name__ == "__main__":
    main()
