"""Memory for caches."""

import math
import mmap

import torch
from torch import Tensor

LEAST = 4 << 20
"""Bytes from which huge pages are asked for: two of x86's at least."""


def empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``like.new_empty(shape)``; on a CPU in huge pages, if it is large and the system has them.

    Sparse attention reads a few hundred bytes here and there: in pages of 4 KiB each of them costs a walk through the
    page table. What is not written yet is 0 there.
    """
    count = math.prod(shape)
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or like.device.type != "cpu" or type(like) is not Tensor or torch.compiler.is_compiling():
        return like.new_empty(shape)
    if count * like.element_size() < LEAST:
        return like.new_empty(shape)
    memory = mmap.mmap(-1, count * like.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(advice)
    except OSError:  # a kernel without them
        return like.new_empty(shape)
    return torch.frombuffer(memory, dtype=like.dtype, count=count).view(shape)
