"""Loads the compiled libraries and knows which backend serves which op, and why."""

import importlib.util
import re
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
CPU_LIBRARY = FOLDER / "libfastok_cpu.so"
CUDA_LIBRARY = FOLDER / "libfastok_cuda.so"

# Ops that python/fastok/triton serves on a GPU when there is no native CUDA library.
TRITON_OPS = ("bipartite_match", "build_map", "merge", "merge_backward", "unmerge")


def load() -> None:
    """Load the libraries that this machine can use and register the fallbacks for the others."""
    if not CPU_LIBRARY.exists():
        raise ImportError(
            f"{CPU_LIBRARY} is missing: this is a source tree that was not built. "
            "Run `pip install --no-build-isolation -e .` (or `make build`) in it."
        )
    torch.ops.load_library(CPU_LIBRARY)
