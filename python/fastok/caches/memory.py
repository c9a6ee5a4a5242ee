"""Memory for caches, on CPUs in mappings of their own."""

import contextlib
import math
import mmap

import torch
from torch import Tensor

LEAST = 4 << 20
"""Bytes from which huge pages are asked for: two of x86's at least."""
MAPPED = 1 << 18
"""Bytes from which records are in a mapping of their own."""

POPULATE_WRITE = 23
"""Linux's MADV_POPULATE_WRITE, which Python does not name."""


def empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``like.new_empty(shape)``; on a CPU in huge pages, if it is large and the system has them.

    Sparse attention reads a few hundred bytes here and there: in pages of 4 KiB each of them costs a walk through the
    page table. What is not written yet is 0 there.
    """
    count = math.prod(shape)
    size = count * like.element_size()
    if type(like) is not Tensor or size < LEAST or not _can_map(like.device):
        return like.new_empty(shape)
    return torch.frombuffer(_map(size), dtype=like.dtype, count=count).view(shape)


def records(size: int, device: torch.device) -> Tensor:
    """uint8 ``[size]``; on a CPU, if it is large, in a mapping that goes back to the system when a cache outgrows it.

    The C library keeps what is freed of up to 32 MB, which would double the memory of a process whose caches grow. All
    of it is taken here, where the system allows, since threads that do so together wait for each other.
    """
    if size < MAPPED or not _can_map(device):
        return torch.empty(size, dtype=torch.uint8, device=device)
    mapping = _map(size)
    with contextlib.suppress(OSError):  # a kernel that does not know it
        mapping.madvise(POPULATE_WRITE)
    return torch.frombuffer(mapping, dtype=torch.uint8)


def _can_map(device: torch.device) -> bool:
    return device.type == "cpu" and hasattr(mmap, "MAP_PRIVATE") and not torch.compiler.is_compiling()


def _map(size: int) -> mmap.mmap:
    """In huge pages, if it is large and the system has them: fewer of them are to be found, and to be cleared."""
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None and size >= LEAST:
        with contextlib.suppress(OSError):  # a kernel without them
            mapping.madvise(advice)
    return mapping
