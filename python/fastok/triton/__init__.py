"""The portable GPU path: ops as Triton kernels, for machines where no native CUDA library was built.

Importing this package does not import triton; the first call of an op does.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch

_MODULES = {
    "attention": "attention",
    "attention_scores": "scores",
    "bipartite_match": "match",
    "build_map": "merge",
    "decode": "decode",
    "decode_packed": "packed",
    "label_scores": "sparse",
    "merge": "merge",
    "merge_backward": "merge",
    "unmerge": "merge",
}


def _lazy(name: str, module: str) -> Callable[..., Any]:
    """Op ``name`` of ``module``, imported when first called, run on the device of its first argument."""

    def op(*args: Any) -> Any:
        kernel = getattr(importlib.import_module(f"{__name__}.{module}"), name)
        # Triton launches on the current device, which need not be the one the tensors are on.
        with torch.cuda.device_of(args[0]):
            return kernel(*args)

    op.__name__ = op.__qualname__ = name
    return op


OPS: dict[str, Callable[..., Any]] = {name: _lazy(name, module) for name, module in _MODULES.items()}
"""Every op served here, with the arguments of ``torch.ops.fastok.<name>``, all positional."""
