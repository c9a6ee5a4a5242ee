"""Checks one after the other on one device: what fails is noted and the rest goes on, as long as the device does."""

import traceback
from collections.abc import Callable

import torch
from fastok import _library

from .record import Record, one_line


def has_kernel(op: str, device: str) -> bool:
    """Whether ``op`` is ours on ``device``; PyTorch operations, which serve other ops on CUDA, promise less."""
    return device != "cuda" or _library.cuda_backend(op) != "reference"


def attempt(record: Record, name: str, check: Callable[[], None]) -> bool:
    """Run one check; whatever it raises is a failure of that one. RuntimeError if the CUDA context did not survive."""
    try:
        check()
    except Exception as error:
        traceback.print_exc()
        record.fail(f"{name}: {one_line(error)}")
        problem = broken()
        if problem is not None:
            raise RuntimeError(f"{name} killed the CUDA context, what follows did not run: {problem}") from error
        return False
    return True


def broken() -> str | None:
    """What is wrong with this process's CUDA context, if something is. An illegal access leaves it useless for good."""
    if not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return one_line(error)
    return None
