"""Token Merging (ToMe): Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, arXiv 2210.09461."""

from dataclasses import dataclass
from typing import ClassVar

from ..ops.checks import check_int
from ..ops.match import bipartite_match
from ..token_map import TokenMap
from .context import TokenContext

Rate = int | list[int] | tuple[int, float]


def schedule(r: Rate, n_layers: int) -> list[int]:
    """How many tokens each layer merges away, the published schedules.

    Args:
        r: an int, the same for all layers; a list, one entry per layer, padded with 0; or ``(r, inflection)``, which
            goes linearly from ``r * (1 - inflection)`` in the first layer to ``r * (1 + inflection)`` in the last, each
            truncated: inflection -1 falls from 2r to 0, +1 rises from 0 to 2r.
        n_layers: number of layers L. A single layer gets what the first of many would.

    Returns:
        A list of L ints (longer if ``r`` is a longer list).
    """
    if isinstance(r, list):
        return r + [0] * (n_layers - len(r))
    if isinstance(r, tuple):
        mean, inflection = r
        first = int(mean * (1 - inflection))
        rise = 2 * mean - 2 * first
        return [int(first + i * rise / max(n_layers - 1, 1)) for i in range(n_layers)]
    return [r] * n_layers


@dataclass(frozen=True)
class ToMe:
    """Merge the r most similar token pairs of every layer, by the mean of its attention keys over the heads.

    Args:
        r: tokens merged away per layer, see :func:`schedule`: an int, a list or ``(r, inflection)``. A layer that has
            fewer than 2r unprotected tokens merges half of them.
        prop_attn: proportional attention: every attention after a merge adds log(size) to a merged token's logit, as if
            it were still there size times. The published setting, except for MAE models without fine-tuning.

    Raises:
        TypeError: ``r`` of another type.
        ValueError: a negative ``r``, or an inflection outside [-1, 1].

    Called with a `TokenContext` that has ``keys``, gives a `TokenMap` in the published slot order. Deterministic; no
    gradient flows through the choice, only through the merged values, so models can be trained with it.
    """

    r: Rate
    prop_attn: bool = True

    needs: ClassVar[tuple[str, ...]] = ("keys",)

    def __post_init__(self) -> None:
        if isinstance(self.r, tuple):
            if len(self.r) != 2 or not isinstance(self.r[1], (int, float)):
                raise TypeError(f"r as a tuple must be (r, inflection), got {self.r!r}; give a list for r per layer")
            if not -1 <= self.r[1] <= 1:
                raise ValueError(f"inflection must be within [-1, 1], got {self.r[1]}")
        elif not isinstance(self.r, (int, list)) or isinstance(self.r, bool):
            raise TypeError(f"r must be an int, a list of ints or (r, inflection), got {self.r!r}")
        rates = self.r if isinstance(self.r, list) else [self.r[0] if isinstance(self.r, tuple) else self.r]
        for rate in rates:
            check_int("r", rate)
            if rate < 0:
                raise ValueError(f"r must be >= 0, got {rate}")

    def reduces(self, layer: int, n_layers: int) -> bool:
        """False for layers whose r is 0."""
        return schedule(self.r, n_layers)[layer] > 0

    def __call__(self, ctx: TokenContext, /) -> TokenMap:
        """The published bipartite soft matching of ``ctx.keys``, clear of the ``ctx.protect`` first tokens."""
        if ctx.keys is None:
            raise ValueError("ToMe needs keys: TokenContext(hidden=x, keys=k) with the layer's keys k[B,N,G,D]")
        if ctx.keys.dim() != 4 or ctx.keys.shape[:2] != ctx.hidden.shape[:2]:
            raise ValueError(
                f"keys must be [B,N,G,D] for hidden [B,N,C], got {list(ctx.keys.shape)} for {list(ctx.hidden.shape)}"
            )
        if not 0 <= ctx.layer < ctx.n_layers:
            raise ValueError(f"layer must be within [0, n_layers={ctx.n_layers}), got {ctx.layer}")
        metric = ctx.keys.detach().mean(2)
        return bipartite_match(metric, schedule(self.r, ctx.n_layers)[ctx.layer], protect=ctx.protect)
