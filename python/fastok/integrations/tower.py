"""What a vision tower's attention shows of itself while the tower runs as it always does.

Attention classes keep their forward, in which the interface that has the attention functions is one of ours: it notes
queries, keys and values and calls the model's own function. Scores come from :func:`fastok.attention_scores`, one pass
for a row or the columns, in the layers that are asked for them and in no other.
"""

import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ..flash import padded
from ..ops.attention import attention_scores
from ..ops.scores import ScoreSpec
from ..reducers.context import Reducer
from .session import in_autocast, in_backward, is_score, score_layers, score_spec
from .swap import rebound

Chunk = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values ``[B,H,N,D]``."""


class Interface:
    """In place of ``ALL_ATTENTION_FUNCTIONS`` in the forward of an attention class.

    Args:
        wrapped: from an implementation's name and its function to the function to be called.
    """

    def __init__(self, wrapped: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> None:
        self.wrapped = wrapped

    def get_interface(self, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        """The attention function for an implementation's name."""
        functions = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS
        return self.wrapped(name, functions.get_interface(name, default))


class Tower:
    """What is to be noted of a vision tower in its next run, and what was.

    Attributes:
        special: number of tokens in front of the patches; scores, keys and values are of the patches.
        class_token: whether the first of these is one.
        wanted: by layer, the names of scores to be had of it.
        scores: by name fp32 ``[B,N]``, or ``[total]`` where the tower packs images: summed over the layers asked for.
        keys, values: ``[B,N,G,D]``, or ``[total,G,D]``, of the layer that makes the feature.
        seconds: what the scores took, and a choice by them before the projector.
    """

    def __init__(self, reducer: Reducer, n_layers: int, special: int, class_token: bool) -> None:
        if "vision_cls" in reducer.needs and not class_token:
            raise NotImplementedError(
                f"{type(reducer).__name__}: required, vision_cls; missing, a class token in the vision tower"
            )
        self.names = [name for name in reducer.needs if is_score(name)]
        self.notes = [name for name in reducer.needs if name in ("keys", "values")]
        self.layers_of = score_layers(reducer, n_layers)
        self.mean_query = getattr(reducer, "mean_query", False) and not class_token
        self.n_layers = n_layers
        self.special = special
        self.class_token = class_token
        self.begin(n_layers - 1)

    @property
    def needed(self) -> bool:
        """Whether anything of the tower's attention is wanted."""
        return bool(self.names or self.notes)

    def begin(self, feature: int) -> None:
        """A run begins, in which layer ``feature`` makes the feature."""
        self.feature = feature
        self.wanted: dict[int, list[str]] = {}
        for name in self.names:
            for layer in self.layers_of.get(name, (feature,)):
                self.wanted.setdefault(layer, []).append(name)
        self.scores: dict[str, Tensor] = {}
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.seconds = 0.0

    def noted(
        self,
        layer: int,
        chunks: list[Chunk],
        options: dict[str, Any],
        keys: Tensor | None = None,
    ) -> None:
        """Layer ``layer`` attended with these queries, keys, values ``[B,H,N,D]``: several for packed sequences."""
        if layer == self.feature:
            if "keys" in self.notes:
                keys = joined(chunks, 1).transpose(1, 2) if keys is None else keys
                self.keys = keys[:, self.special :]
            if "values" in self.notes:
                self.values = joined(chunks, 2).transpose(1, 2)[:, self.special :]
        names = self.wanted.get(layer, [])
        if not names:
            return
        compiling = torch.compiler.is_compiling()
        started = 0.0 if compiling else perf_counter()
        q, k = joined(chunks, 0), joined(chunks, 1)
        scale = options.get("scaling")
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        q, k = in_autocast(q, k)
        q, k = (padded(x.transpose(1, 2)) for x in (q, k))
        starts = options.get("cu_seq_lens_q")
        if starts is None and len(chunks) > 1:
            lengths = torch.tensor([0, *(chunk[0].shape[2] for chunk in chunks)])
            starts = lengths.cumsum(0).int().to(q.device)
        packing: dict[str, Any] = {}
        if starts is not None:
            q, k = q.flatten(0, 1), k.flatten(0, 1)
            packing = {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
        for name in names:
            if name == "cls" and self.mean_query and starts is not None:
                found = mean_query(q, k, starts, scale)
            elif name == "cls" and self.mean_query:
                spec = ScoreSpec(rows=0, cols=(self.special, None))
                found = attention_scores(q.mean(1, keepdim=True), k, spec=spec, scale=scale)
            else:
                spec = score_spec(name, self.special, class_token=self.class_token)
                found = attention_scores(q, k, spec=spec, scale=scale, **packing)
            self.scores[name] = self.scores[name] + found if name in self.scores else found
        if not compiling:
            self.seconds += perf_counter() - started


def mean_query(q: Tensor, k: Tensor, starts: Tensor, scale: float) -> Tensor:
    """fp32 ``[total]``: of each packed sequence, the row that the mean of its queries ``[total,H,D]`` would have."""
    count, heads = len(starts) - 1, k.shape[1]
    sequence = torch.bucketize(torch.arange(len(q), device=q.device), starts[1:], right=True)
    sums = torch.zeros(count, *q.shape[1:], device=q.device).index_add(0, sequence, q.float())
    mean = sums / starts.diff().clamp(min=1)[:, None, None]
    logits = (mean[sequence] * k.float()).sum(-1) * scale
    index = sequence[:, None].expand(-1, heads)
    most = logits.new_full((count, heads), -torch.inf).scatter_reduce(0, index, logits, "amax")
    weights = (logits - most[sequence]).exp()
    total = logits.new_zeros(count, heads).index_add(0, sequence, weights)
    return (weights / total[sequence]).mean(1)


def joined(chunks: list[Chunk], part: int) -> Tensor:
    """Queries (0), keys (1) or values (2) of packed sequences in one, without gradient."""
    parts = [chunk[part].detach() for chunk in chunks]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


class Watch:
    """One attention module's part in a `Tower`.

    Attributes:
        chunks: queries, keys and values of the present run, while one is observed.
        keys: ``[B,N,G,D]``, the keys before rotary embedding, where somebody notes them.
    """

    def __init__(self, tower: Tower, layer: int, heads: int = 0) -> None:
        self.tower = tower
        self.layer = layer
        self.heads = heads
        self.keys: Tensor | None = None
        self.chunks: list[Chunk] | None = None
        self.options: dict[str, Any] = {}


def _noting(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
        watch: Watch = module._fastok
        if watch.chunks is not None:
            watch.chunks.append((query, key, value))
            watch.options = options
        return own(module, query, key, value, *args, **options)

    return attend


_interface = Interface(_noting)


def watched(base: Any) -> dict[str, Callable[..., Any]]:
    """Methods for an attention module whose state is a `Watch`."""
    own = rebound(base.forward, ALL_ATTENTION_FUNCTIONS=_interface)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        watch: Watch = self._fastok
        tower = watch.tower
        wanted = watch.layer in tower.wanted or (tower.notes and watch.layer == tower.feature)
        if not wanted or in_backward():
            return own(self, *args, **kwargs)
        watch.chunks = []
        try:
            out = own(self, *args, **kwargs)
            tower.noted(watch.layer, watch.chunks, watch.options, watch.keys)
        finally:
            watch.chunks, watch.options, watch.keys = None, {}, None
        return out

    return {"forward": forward}
