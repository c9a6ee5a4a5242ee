"""Dropping tokens in the layers of the vision towers of Qwen2-VL and Qwen2.5-VL.

A token is what the patch merger makes one of: patches that lie side by side in the tower's order, and leave together,
between the attention of a layer and its MLP. What comes behind is given the rotary embedding of the patches that are
left, and how many are left of each frame or window. The merger returns a row for each token that there was, 0 for those
that are gone, so that the tower undoes its order of windows as ever.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ..reducers.context import Reducer, TokenContext
from ..token_map import SoftMap, TokenMap
from .session import score_layers
from .swap import Swaps, rebound
from .tower import Chunk, Interface, joined, mean_query

SHOWN = ("hidden", "values", "cls")
"""What these layers can show a reducer."""


class Layers:
    """A reducer in the layers of one tower. Only the last run is remembered.

    Attributes:
        run: the present run.
        left: after it, for each image, int64 ``[m]``: the tokens that are left of it, numbered in raster order.
        seconds: what scores, reducer and dropping took.
    """

    def __init__(self, reducer: Reducer, core: str, visual: Any) -> None:
        n_layers = len(visual.blocks)
        summed, by_mean_query = score_layers(reducer, n_layers), getattr(reducer, "mean_query", False)
        missing = [
            name
            for name in reducer.needs
            if name not in SHOWN or name in summed or (name == "cls" and not by_mean_query)
        ]
        if missing:
            raise NotImplementedError(
                f"{type(reducer).__name__} in the layers of {core}'s vision tower: required, "
                f"{', '.join(reducer.needs)}; supported, methods that drop tokens by {', '.join(SHOWN)} of the layer, "
                f"cls being the row of the mean query; missing, {', '.join(missing)}; use place='output'"
            )
        self.reducer = reducer
        self.group: int = visual.spatial_merge_size**2
        reduces = getattr(reducer, "reduces", None)
        self.active = [reduces is None or reduces(i, n_layers) for i in range(n_layers)]
        self.run: Run | None = None
        self.left: list[Tensor] = []
        self.seconds = 0.0
        # Here and not by a decorator, which would make `import fastok` import the compiler.
        self.outside_graphs = torch.compiler.disable(
            _forward, reason="how many tokens the layers leave of each image is read on the host"
        )

    def swap(self, visual: Any, swaps: Swaps) -> None:
        """Have the tower drop what the reducer does not keep."""
        swaps.swap(visual, self, _tower)
        swaps.swap(visual.merger, self, _merger)
        for index, block in enumerate(visual.blocks):
            swaps.swap(block, index, _block)
            if self.active[index]:
                swaps.swap(block.attn, self, _attention)


class Left:
    """The tokens that are still there.

    Attributes:
        at: int64 ``[m]``, ascending: their places in the tower's order of all tokens; None: all are there.
        among: int64 ``[m]``, their places among those that there were before; None: all are there.
        group: how many patches are a token.
    """

    def __init__(self, group: int, at: Tensor | None = None, among: Tensor | None = None) -> None:
        self.group = group
        self.at = at
        self.among = among
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def drop(self, x: Tensor) -> Tensor:
        """``x[patches,…]`` before, of those that are left."""
        return x if self.among is None else self._of(x, self.among)

    def patches(self, x: Tensor) -> Tensor:
        """``x[patches,…]`` of all patches, of those that are left."""
        at = self.at
        return x if at is None else self._once(x, lambda x: self._of(x, at))

    def starts(self, starts: Tensor) -> Tensor:
        """What cumulative lengths ``[sequences + 1]`` in patches become; sequences of which nothing is left go."""
        at = self.at
        if at is None:
            return starts

        def left(starts: Tensor) -> Tensor:
            ends = torch.searchsorted(at, starts.long() // self.group) * self.group
            return ends.unique_consecutive().to(starts.dtype)

        return self._once(starts, left)

    def _of(self, x: Tensor, tokens: Tensor) -> Tensor:
        return x.unflatten(0, (-1, self.group))[tokens].flatten(0, 1)

    def _once(self, x: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """``make(x)``: layers are given the same tensors, and nothing is dropped in most of them."""
        if id(x) not in self._made:
            self._made[id(x)] = x, make(x)  # with x, so that nothing else gets its id
        return self._made[id(x)][1]


@dataclass(eq=False)
class _Image:
    """One image or video in a run.

    Attributes:
        n: how many tokens it had.
        place: int64 ``[n]``, where each is in the tower's order, by its number in raster order.
        kept: int64 ``[m]``, the numbers of those that are left, in the order of the reducer's outputs.
        extra: what the reducer has left for its next layer, ``[1,m]`` each.
    """

    n: int
    place: Tensor
    kept: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)


class Run:
    """One run of a tower. Blocks find theirs in an argument, also where gradient checkpointing runs them once more.

    Attributes:
        window_index: int64 ``[tokens]``, the tower's order by numbers in raster order, if that is another.
        left: by layer, the tokens that its attention is given, as far as layers have run.
    """

    def __init__(self, layers: Layers, grids: list[list[int]], device: torch.device) -> None:
        self.layers = layers
        self.tokens = [t * h * w // layers.group for t, h, w in grids]
        frames = torch.tensor([0, *(h * w for t, h, w in grids for _ in range(t))])
        self.frames = frames.cumsum(0).int().to(device)
        self.window_index: Tensor | None = None
        self.left = [Left(layers.group)]
        self.device = device

    @cached_property
    def images(self) -> list[_Image]:
        """One for each image or video, once the tower has its order."""
        order = self.window_index
        places = torch.arange(sum(self.tokens)) if order is None else order.argsort()
        return [
            _Image(len(x), x, torch.arange(len(x), device=self.device))
            for x in places.to(self.device).split(self.tokens)
        ]

    def chooses(self, index: int) -> bool:
        """Whether layer ``index`` is to drop tokens and has not done so yet."""
        return self.layers.active[index] and len(self.left) == index + 1

    def reduce(self, index: int, x: Tensor, chunks: list[Chunk], scale: float) -> Tensor:
        """What is left of ``x[patches,C]`` behind the attention of layer ``index``, of which these are the chunks."""
        if len(self.left) == index + 1:
            self.left.append(self._chosen(index, x.detach(), chunks, scale) if chunks else self.left[index])
        before, after = self.left[index : index + 2]
        return x if after is before else after.drop(x)

    def _chosen(self, index: int, x: Tensor, chunks: list[Chunk], scale: float) -> Left:
        started = perf_counter()
        left, group = self.left[index], self.layers.group
        q, k, v = (joined(chunks, part)[0].transpose(0, 1) for part in range(3))
        row = mean_query(q, k, left.starts(self.frames), scale)
        shown = [token_means(y, group) for y in (x, v, row)]
        fewer = [self._cut(index, image, left, *shown) for image in self.images]
        if any(fewer):
            at = torch.cat([image.place[image.kept] for image in self.images]).sort().values
            left = Left(group, at, at if left.at is None else torch.searchsorted(left.at, at))
        self.layers.seconds += perf_counter() - started
        return left

    def _cut(self, index: int, image: _Image, left: Left, hidden: Tensor, values: Tensor, row: Tensor) -> bool:
        """Whether the reducer drops tokens of this image."""
        places = image.place[image.kept]
        rows = places if left.at is None else torch.searchsorted(left.at, places)
        reducer, active = self.layers.reducer, self.layers.active
        ctx = TokenContext(
            hidden[rows][None],
            values=values[rows][None],
            scores={"cls": row[rows][None]},
            layer=index,
            n_layers=len(active),
            extra=image.extra,
            n_tokens=image.n,
        )
        kept = _kept(reducer, reducer(ctx), len(rows))
        image.kept, image.extra = image.kept[kept], {name: x[:, kept] for name, x in ctx.extra.items()}
        return len(kept) < len(rows)


def token_means(x: Tensor, group: int) -> Tensor:
    """``[patches,…]`` as the tower runs them, to ``[tokens,…]``."""
    return x.unflatten(0, (-1, group)).float().mean(1).to(x.dtype)


def _kept(reducer: Reducer, token_map: object, n: int) -> Tensor:
    """int64 ``[m]``, which of ``n`` tokens a map for one sample keeps, in the order of its outputs."""
    name = type(reducer).__name__
    if isinstance(token_map, SoftMap):
        raise NotImplementedError(
            f"{name} in the layers of Qwen's vision towers: required, a SoftMap; supported, a TokenMap that drops "
            "tokens; use place='output'"
        )
    if not isinstance(token_map, TokenMap):
        raise TypeError(f"{name} must return a TokenMap, got {type(token_map).__name__}")
    if (token_map.batch_size, token_map.n_in) != (1, n):
        raise ValueError(
            f"{name} must return a map of 1 sample from {n} tokens, got {token_map.batch_size} samples from "
            f"{token_map.n_in}"
        )
    kept = token_map.representative[0]
    members, slots = torch.stack([token_map.keep_mask.sum(), (kept >= 0).sum()]).tolist()
    if members != slots:
        raise NotImplementedError(
            f"{name} in the layers of Qwen's vision towers: required, {members} tokens merged into {slots}; "
            "supported, tokens that are kept or dropped; use place='output'"
        )
    if slots == 0:
        raise ValueError(f"{name} must keep a token of each image, got a map that drops all {n}")
    return kept if slots == len(kept) else kept[kept >= 0]


# ---- methods of the tower's modules ----------------------------------------------------------------------------------


def _forward(own: Callable[..., Any], tower: Any, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
    layers: Layers = tower._fastok
    layers.seconds = 0.0
    layers.run = run = Run(layers, grid_thw.tolist(), hidden_states.device)
    output = own(tower, hidden_states, grid_thw, fastok_run=run, **kwargs)
    layers.left = [image.kept for image in run.images]
    layers.run = None
    return output


def _tower(base: Any) -> dict[str, Callable[..., Any]]:
    def forward(self: Any, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
        return self._fastok.outside_graphs(base.forward, self, hidden_states, grid_thw, **kwargs)

    if not hasattr(base, "permute_input_for_window_attn"):
        return {"forward": forward}

    def permute_input_for_window_attn(self: Any, x: Tensor, window_index: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._fastok.run.window_index = window_index
        return base.permute_input_for_window_attn(self, x, window_index, *args, **kwargs)

    return {"forward": forward, "permute_input_for_window_attn": permute_input_for_window_attn}


def _block(base: Any) -> dict[str, Callable[..., Any]]:
    def forward(
        self: Any,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        *,
        fastok_run: Run,
        **kwargs: Any,
    ) -> Tensor:
        index: int = self._fastok
        left = fastok_run.left[index]
        chunks: list[Chunk] = []
        if fastok_run.chooses(index):
            kwargs["fastok_chunks"] = chunks
        attended = self.attn(
            self.norm1(hidden_states),
            cu_seqlens=left.starts(cu_seqlens),
            position_embeddings=tuple(left.patches(x) for x in position_embeddings),
            **kwargs,
        )
        x = fastok_run.reduce(index, hidden_states + attended, chunks, self.attn.scaling)
        return x + self.mlp(self.norm2(x))

    return {"forward": forward}


def _noting(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        fastok_chunks: list[Chunk] | None = None,
        **options: Any,
    ) -> Any:
        if fastok_chunks is not None:
            fastok_chunks.append((query, key, value))
        return own(module, query, key, value, *args, **options)

    return attend


_interface = Interface(_noting)


def _attention(base: Any) -> dict[str, Callable[..., Any]]:
    return {"forward": rebound(base.forward, ALL_ATTENTION_FUNCTIONS=_interface)}


def _merger(base: Any) -> dict[str, Callable[..., Any]]:
    def forward(self: Any, x: Tensor) -> Tensor:
        run: Run = self._fastok.run
        tokens: Tensor = base.forward(self, x)
        at = run.left[-1].at
        return tokens if at is None else tokens.new_zeros(sum(run.tokens), tokens.shape[1]).index_copy(0, at, tokens)

    return {"forward": forward}
