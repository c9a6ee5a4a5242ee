"""What a reducer is shown, and what a reducer is."""

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ..token_map import SoftMap, TokenMap


@dataclass(eq=False)
class TokenContext:
    """The tokens at the place where they are reduced, and what else a reducer may need to know about them.

    Attributes:
        hidden: ``[B,N,C]``, the tokens to be reduced.
        keys: ``[B,N,G,D]``, this layer's attention keys of the same tokens (before rotary embedding).
        values: ``[B,N,G,D]``, the values.
        scores: named attention scores, each ``[B,N]`` over all N tokens: ``"cls"``, ``"column"``, ``"last"``,
            ``"text"``, or with a layer role, such as ``"column:mid"``.
        size: fp32 ``[B,N]``, how many original tokens each token stands for; None means 1.
        protect: that many leading tokens (class, distillation, registers) must stay as they are.
        grid: ``(t, h, w)`` of the tokens after the protected ones, where they still form a grid.
        text: ``[B,m,C]``, embedded text that belongs to the image.
        layer: index of this layer, from 0.
        n_layers: how many layers there are.
        extra: further named features that a single method uses.
    """

    hidden: Tensor
    keys: Tensor | None = None
    values: Tensor | None = None
    scores: dict[str, Tensor] = field(default_factory=dict)
    size: Tensor | None = None
    protect: int = 0
    grid: tuple[int, int, int] | None = None
    text: Tensor | None = None
    layer: int = 0
    n_layers: int = 1
    extra: dict[str, Tensor] = field(default_factory=dict)


class Reducer(Protocol):
    """A published method with its hyper-parameters. It holds no state: the same context gives the same map.

    A reducer may also have ``prop_attn: bool`` (attention adds log(size) to the logit of each merged key),
    ``sized: bool`` (False for a method in which a token counts once whatever was merged into it: no sizes are kept) and
    ``reduces(layer, n_layers) -> bool`` (False where it would return the identity, so that it need not be called).
    What it needs of a layer's attention it names in ``needs`` as `scores` are named, such as ``"cls"``.
    """

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the `TokenContext` fields that must be given, beside ``hidden``."""

    def __call__(self, ctx: TokenContext, /) -> TokenMap | SoftMap:
        """The map that reduces ``ctx.hidden``."""
