"""How a cache hands itself to the attention function: as an attribute of the new keys that its update returns.

transformers passes what a cache's ``update`` returns to the attention function and nothing else of the cache. A cache
that is read in place returns the new tokens alone, marked with the layer that holds all of them.
"""

from typing import Any, Protocol, cast

from torch import Tensor

_ATTRIBUTE = "_fastok_held"


class Held(Protocol):
    """One layer of a cache that attention reads in place."""

    @property
    def length(self) -> int:
        """Tokens in the cache, the new ones included."""

    def attend(self, q: Tensor, scale: float, softcap: float | None, key_bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """``out[B,S,H,D_v]`` and ``lse[B,H,S]`` of the newest tokens' queries ``[B,S,H,D]``, causal."""

    @property
    def observes(self) -> bool:
        """Whether it waits to be told what the prompt attended to, by `observe`."""

    def observe(self, q: Tensor, k: Tensor, lse: Tensor, masking: dict[str, Any]) -> None:
        """Queries ``[B,T,H,D]``, keys ``[B,T,G,D]``, log-sum-exp ``[B,H,T]`` of the prompt, and its masking."""

    def unpacked(self) -> tuple[Tensor, Tensor]:
        """All keys and values ``[B,G,T,D]``."""


def hold(keys: Tensor, by: Held) -> Tensor:
    """``keys``, marked."""
    setattr(keys, _ATTRIBUTE, by)
    return keys


def holder(keys: Tensor) -> Held | None:
    """Who holds the tokens before these keys, if they are marked."""
    return cast("Held | None", getattr(keys, _ATTRIBUTE, None))
