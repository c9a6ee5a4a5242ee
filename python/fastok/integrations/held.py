"""How a cache hands itself to the attention function: as tensors that stand for all of its tokens.

transformers passes what a cache's ``update`` returns to the attention function, and nothing else of the cache. fastok's
attention takes the layer out of it and reads that in place. Anything else that is done with the tensors works on what
they stand for: the cache is unpacked, with a warning.
"""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Held(Protocol):
    """One layer of a cache that attention reads in place."""

    most_rows: int
    """New tokens that it can be attended to with in place."""
    whole: bool
    """Whether a prompt too is attended to by `attend` only."""
    compiles: bool
    """Whether `attend` can be traced by ``torch.compile``, and is sure to be what follows."""

    @property
    def length(self) -> int:
        """Tokens that went through it, the new ones included."""

    def called_by(self, attention: nn.Module, position: Tensor | None, window: int | None) -> None:
        """Said before the others: which layer asks, where its new tokens stand, ``[B,S]``, if it tells, its window."""

    def attend(self, q: Tensor, scale: float, softcap: float | None, key_bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """``out[B,S,H,D_v]`` and ``lse[B,H,S]`` of the newest tokens' queries ``[B,S,H,D]``, causal."""

    @property
    def observes(self) -> bool:
        """Whether it waits to be told what the prompt attended to, by `observe`."""

    def observe(self, q: Tensor, k: Tensor, lse: Tensor, masking: dict[str, Any]) -> None:
        """Queries ``[B,T,H,D]``, keys ``[B,T,G,D]``, log-sum-exp ``[B,H,T]`` of the prompt, and its masking."""

    def unpacked(self) -> tuple[Tensor, Tensor]:
        """All keys and values ``[B,G,T,D]``."""


@dataclass
class Handle:
    """What a pair of `HeldTensor` stands for: all tokens of ``layer``, of which these are the new ones."""

    layer: Held
    keys: Tensor
    values: Tensor
    _unpacked: list[Tensor] = field(default_factory=list)

    def all(self) -> list[Tensor]:
        """All keys and all values ``[B,G,T,D]``, with a warning unless they are the new ones."""
        if not self._unpacked:
            if self.layer.length > self.keys.shape[2]:
                warnings.warn(
                    "a cache that attn_implementation='fastok' reads in place is unpacked in every step for another "
                    "one",
                    stacklevel=2,
                )
            self._unpacked = list(self.layer.unpacked())
        return self._unpacked


class HeldTensor(torch.Tensor):
    """The keys or the values of a `Handle`."""

    handle: Handle
    place: int

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Anything that is not fastok's attention: on all of the tokens."""
        kwargs = {} if kwargs is None else kwargs
        return func(*map(_whole, args), **{name: _whole(value) for name, value in kwargs.items()})


def _whole(x: Any) -> Any:
    if isinstance(x, HeldTensor):
        return x.handle.all()[x.place]
    return type(x)(map(_whole, x)) if type(x) in (tuple, list) else x


_traced: list[Handle] = []
"""While ``torch.compile`` traces, which cannot follow a `HeldTensor`: what the layer that was updated last holds."""


def hold(layer: Held, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """New keys and values that stand for all that ``layer`` holds, them included."""
    if torch.compiler.is_compiling():
        if not layer.compiles:
            raise NotImplementedError(
                f"{type(layer).__name__}: required, a cache that is read in place inside torch.compile; supported, "
                "PackedCache; missing, the other caches, outside of it"
            )
        _traced.append(Handle(layer, keys, values))
        return keys, values
    handle, held = Handle(layer, keys, values), []
    for place, x in enumerate((keys, values)):
        tensor = x.detach().as_subclass(HeldTensor)
        tensor.handle, tensor.place = handle, place
        held.append(tensor)
    return held[0], held[1]


def handle_of(keys: Tensor) -> Handle | None:
    """What these keys stand for, if they are held."""
    if torch.compiler.is_compiling():
        return _traced.pop() if _traced else None
    return keys.handle if isinstance(keys, HeldTensor) else None
