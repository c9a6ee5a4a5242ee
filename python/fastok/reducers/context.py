"""What a reducer is shown, and what a reducer is."""

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ..ops.checks import check_at_least, check_shape
from ..token_map import SoftMap, TokenMap


@dataclass(eq=False)
class TokenContext:
    """The tokens at the place where they are reduced, and what else a reducer may need to know about them.

    Attributes:
        hidden: ``[B,N,C]``, the tokens to be reduced.
        keys: ``[B,N,G,D]``, this layer's attention keys of the same tokens (before rotary embedding).
        values: ``[B,N,G,D]``, the values.
        scores: named attention scores, each ``[B,N]`` over all N tokens: ``"cls"``, ``"column"``, ``"last"``,
            ``"text"``, or with a layer role, such as ``"column:mid"``; ``"cls:logit"`` is before the softmax.
        size: fp32 ``[B,N]``, how many original tokens each token stands for; None means 1.
        protect: that many leading tokens (class, distillation, registers) must stay as they are.
        grid: ``(t, h, w)`` of the tokens after the protected ones, where they still form a grid.
        text: ``[B,m,C]`` (or ``[1,m,C]`` for all samples), embedded text that belongs to the image.
        layer: index of this layer, from 0.
        n_layers: how many layers there are.
        extra: further named features. Those that models can show: ``"vision"``, ``[B,N,C_v]``, the vision tower's
            features, and ``"vision_cls"``, ``[B,C_v]``, its class token's; ``"valid"``, bool ``[B,N]``, False for
            padding that does not reach the prompt (all valid if not given); ``"crops"``, int64 ``[2]`` on the CPU,
            where the B samples are a thumbnail and rows x columns crops of one image (0 x 0 if not given: they are
            not).
        n_tokens: how many tokens there were before the first layer, protected ones included; None: N.
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
    n_tokens: int | None = None

    def __post_init__(self) -> None:
        check_shape("hidden", self.hidden, (None, None, None), "[B,N,C]")
        check_at_least("protect", self.protect, 0)
        if self.protect > self.hidden.shape[1]:
            raise ValueError(f"protect must be within [0, N={self.hidden.shape[1]}], got {self.protect}")


class Reducer(Protocol):
    """A published method with its hyper-parameters. It holds no state: the same context gives the same map.

    A reducer may also have

    - ``reduces(layer, n_layers) -> bool``: False where it would return the identity, so that it need not be called;
    - ``prop_attn: bool``: attention adds log(size) to the logit of each merged key;
    - ``sized: bool``: False for a method in which a token counts once whatever was merged into it: no sizes are kept;
    - ``score_layers(n_layers) -> dict[str, tuple[int, ...]]``: for scores by name, the layers of an encoder whose
      scores are summed, -1 being the last; a score that is not listed is of the layer at hand (before a language
      model: of the layer that makes the features);
    - ``mean_query: bool``: of an encoder without a class token, ``"cls"`` is the row that the mean of all queries would
      have; otherwise it is the mean over all rows, and in the layers of such an encoder the method is refused;
    - ``whole_image: bool``: True to be shown all crops or frames of an image as one sample, without ``grid``;
    - ``by_scores: bool``: True if it only drops tokens, by scores and places and whatever is in ``hidden``: a model may
      then ask it before the tokens are projected, and project no others;
    - ``ragged: bool``: True if how many tokens it leaves depends on what is in them, not on their number alone;
    - ``newlines``: which newline embeddings of a stitched image stay: ``"all"``, ``"filled"`` or ``"none"``.

    A method that accumulates over layers puts a tensor ``[B,N]`` into ``ctx.extra`` under its class's name; the next
    layer finds it there, reduced with the tokens.
    """

    @property
    def needs(self) -> tuple[str, ...]:
        """What it must be shown, beside ``hidden``: names of `TokenContext` fields, of ``scores`` and in ``extra``."""

    def __call__(self, ctx: TokenContext, /) -> TokenMap | SoftMap:
        """The map that reduces ``ctx.hidden``."""
