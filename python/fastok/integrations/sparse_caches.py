"""Caches for transformers in which some layers choose for others, or whose heads keep little of the prompt."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from ..flash import padded
from ..ops.attention import attention_scores
from ..ops.checks import check_at_least, check_int
from ..ops.scores import ScoreSpec
from ..ops.sparse import select_tokens
from .dense_layer import DenseLayer, HeadwiseLayer, hidden
from .held_cache import HeldCache, HeldLayer

# ---- TidalDecode -----------------------------------------------------------------------------------------------------


class TidalCache(HeldCache):
    """A few layers attend to everything and choose tokens, by their largest logits; later layers attend to those.

    Args:
        n_keep: tokens chosen, per KV head.
        select_layers: where to choose; layers before the first attend to everything. Published: 2 and 13 of 32.
        shared: one list for all query heads of a KV head; published (for models without such groups): one for each.

    Raises:
        TypeError, ValueError: an argument of another type or range.

    For ``attn_implementation="fastok"``; another one gets all tokens, with a warning. Steps of one token are sparse,
    others attend to everything; the newest token is always attended to, padding never chosen. Works with batches,
    beams, ``crop``, `reset`. Yang et al., arXiv 2410.05076.
    """

    def __init__(self, n_keep: int, *, select_layers: tuple[int, ...] = (2, 13), shared: bool = True) -> None:
        check_at_least("n_keep", n_keep, 1)
        if not isinstance(select_layers, (tuple, list)):
            raise TypeError(
                f"select_layers must be a tuple of ints, got {type(select_layers).__name__} {select_layers!r}"
            )
        for layer in select_layers:
            check_int("select_layers", layer)
        if not isinstance(shared, bool):
            raise TypeError(f"shared must be True or False, got {shared!r}")
        if not select_layers or any(layer < 0 for layer in select_layers):
            raise ValueError(f"select_layers must name at least one layer, from 0; got {select_layers}")
        super().__init__(partial(_tidal_layer, _Chosen(), n_keep, select_layers, shared))


def _tidal_layer(tokens: "_Chosen", n_keep: int, select_layers: tuple[int, ...], shared: bool, index: int) -> HeldLayer:
    if index < min(select_layers):
        return DenseLayer()
    return TidalLayer(tokens, n_keep, chooses=index in select_layers, shared=shared)


class _Chosen:
    """The tokens ``[B,G|H,K]`` that the last choosing layer chose in this step."""

    tokens: Tensor | None = None


class TidalLayer(DenseLayer):
    """One layer of a `TidalCache` behind its first choice."""

    def __init__(self, chosen: _Chosen, n_keep: int, *, chooses: bool, shared: bool) -> None:
        super().__init__()
        self.chosen, self.n_keep, self.chooses, self.shared = chosen, n_keep, chooses, shared

    def attend(self, q: Tensor, scale: float, softcap: float | None, key_bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Held`."""
        if q.shape[1] > 1 or self.n_keep >= self.length:
            return super().attend(q, scale, softcap, key_bias)
        if not self.chooses:
            return self.to_tokens(self.chosen.tokens, q, scale, softcap, key_bias)
        # The query heads of a KV head as rows of one, so that keys are read once for all of them.
        rows = padded(q).to(self.dtype)[:, 0].unflatten(1, (self.kv.k.shape[2], -1)).transpose(1, 2)
        spec = ScoreSpec(reduce="max" if self.shared else "none", heads="none", logits=True)
        scores = attention_scores(rows, self.kv.k, spec=spec, scale=scale)
        scores = hidden(scores if self.shared else scores.flatten(1, 2), key_bias)
        self.chosen.tokens, _ = select_tokens(scores, self.n_keep, recent=1)
        return super().attend(q, scale, softcap, key_bias)


# ---- SnapKV, PyramidKV -----------------------------------------------------------------------------------------------


class SnapKVCache(HeldCache):
    """After the prompt each KV head keeps only the tokens that the prompt's last queries attend to most, and those.

    Args:
        capacity: tokens kept per head of a longer prompt, the window included. Later tokens are all kept.
        window: how many last queries tell.
        pool: odd width of the mean over neighbouring keys' scores (zeros beyond the border).

    Raises:
        TypeError, ValueError: an argument of another type or range. NotImplementedError, from the model: an attention
        implementation other than ``"fastok"``.

    Memory really shrinks: heads keep different tokens, each head's stored one after the other. The query heads of a KV
    head share a list, by the mean of their scores (published: keys are repeated for every query head). Rotary positions
    are those of the prompt. Works with batches (padding is kept last), beams and ``crop`` of what came after the
    prompt. Li et al., arXiv 2404.14469.
    """

    def __init__(self, capacity: int, *, window: int = 32, pool: int = 5) -> None:
        check_at_least("window", window, 1)
        check_at_least("capacity", capacity, window + 1)
        check_at_least("pool", pool, 1)
        if pool % 2 == 0:
            raise ValueError(f"pool must be odd, got {pool}")
        super().__init__(partial(_snap_layer, capacity, window, pool))


def _snap_layer(capacity: int, window: int, pool: int, index: int) -> HeldLayer:
    return EvictingLayer(partial(_uniform, capacity), window, pool)


def _uniform(capacity: int, total: int) -> int:
    return capacity


class PyramidKVCache(HeldCache):
    """`SnapKVCache` with capacities that fall from layer to layer.

    Args:
        capacity: tokens kept per head, on average over the layers, the window included.
        n_layers: of the model.
        beta: the last layer keeps 1/beta of the average, besides the window.
        window, pool: as for `SnapKVCache`, whose errors and limits apply too.

    A prompt shorter than twice the capacity (without window), padding counted, is cut to ``capacity`` in every layer,
    as published. Cai et al., arXiv 2406.02069.
    """

    def __init__(self, capacity: int, n_layers: int, *, beta: int = 20, window: int = 32, pool: int = 5) -> None:
        check_at_least("n_layers", n_layers, 1)
        check_at_least("beta", beta, 1)
        SnapKVCache(capacity, window=window, pool=pool)  # the same checks
        super().__init__(partial(_pyramid_layer, capacity, n_layers, beta, window, pool))


def _pyramid_layer(capacity: int, n_layers: int, beta: int, window: int, pool: int, index: int) -> HeldLayer:
    return EvictingLayer(partial(_pyramid, capacity, window, beta, index, n_layers), window, pool)


def _pyramid(capacity: int, window: int, beta: int, layer: int, n_layers: int, total: int) -> int:
    """PyramidKV's capacity of a layer, the window included."""
    mean = capacity - window
    if total < 2 * mean:
        return capacity
    least = mean // beta
    most = 2 * mean - least
    if most >= total - window:
        most = total - window
        least = 2 * mean - most
    return most - layer * ((most - least) // max(n_layers - 1, 1)) + window


class EvictingLayer(HeadwiseLayer):
    """One layer whose heads keep different tokens of the prompt."""

    def __init__(self, capacity: Callable[[int], int], window: int, pool: int) -> None:
        super().__init__()
        self.capacity, self.window, self.pool = capacity, window, pool

    def observe(self, q: Tensor, k: Tensor, lse: Tensor, masking: dict[str, Any]) -> None:
        """See `Held`."""
        self.store_prompt()
        capacity = self.capacity(self.length)
        if capacity >= self.length:
            return
        spec = ScoreSpec(rows=(-self.window, None), cols=(0, -self.window), heads="group_mean", pool=self.pool)
        self.keep_best(attention_scores(q, k, lse=lse, spec=spec, **masking), capacity - self.window)
