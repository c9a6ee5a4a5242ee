"""A decode step of a cache layer as one op for ``torch.compile``, which appends, attends in place, and is a black box.

What a layer holds are Python numbers and tensors that grow; a graph that knew them would be compiled anew at every
step. The op is told which layer by a tensor, so that one graph serves every cache.
"""

import itertools
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Stepping(Protocol):
    """A layer that can do a step of its own."""

    def step(
        self, q: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float | None, key_bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Store new ``keys, values [B,G,S,D]``; ``out[B,S,H,D]`` and ``lse[B,H,S]`` of queries ``[B,S,H,D]``."""


_numbers = itertools.count()
_layers: WeakValueDictionary[int, Stepping] = WeakValueDictionary()


def register(layer: Stepping) -> Tensor:
    """What the op is told to find ``layer``: int64 ``[2]`` on the CPU, its number and how many steps there were."""
    number = next(_numbers)
    _layers[number] = layer
    with torch.inference_mode(False):
        return torch.tensor([number, 0])


@torch.library.custom_op("fastok::cache_step", mutates_args=("which",))
def cache_step(
    which: Tensor, q: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float, key_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`Stepping.step` of the layer that ``which`` stands for; a softcap of 0 is none."""
    which[1] += 1  # so that no compiler drops a step, or does it twice
    layer = _layers[int(which[0])]
    out, lse = layer.step(q, keys, values, scale, softcap or None, key_bias)
    return out.clone(memory_format=torch.contiguous_format), lse


@cache_step.register_fake
def _cache_step_fake(
    which: Tensor, q: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float, key_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, rows, heads, _ = q.shape
    return q.new_empty(batch, rows, heads, values.shape[3]), q.new_empty(batch, heads, rows, dtype=torch.float32)
