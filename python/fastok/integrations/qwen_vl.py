"""Qwen2-VL and Qwen2.5-VL: merged patches, packed images, windows in the vision tower, positions of three axes.

The tokens are what the patch merger returns, one for each 2 x 2 patches, in raster order (a video's frames one after
the other). Scores, keys, values and features of the tower are means over the patches of a token; Qwen2.5-VL runs its
tower in the order of windows, which is undone. Where attention is within windows, so are its scores. Reducers that only
drop tokens can act in the tower's layers: see `qwen_layers`.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..reducers.context import Reducer
from ..token_map import TokenMap
from .qwen_layers import Layers, token_means
from .swap import Swaps, calls, check_free
from .tower import Tower, Watch, watched
from .visual import Visual
from .vlm import Modality


class Qwen2VLFamily:
    """Qwen2-VL."""

    module: ClassVar[str] = "qwen2_vl.modeling_qwen2_vl"
    core: ClassVar[str] = "Qwen2VLModel"
    head: ClassVar[str] = "Qwen2VLForConditionalGeneration"
    modalities: ClassVar[tuple[Modality, ...]] = (
        Modality("image", "pixel_values", ("image_grid_thw",)),
        Modality("video", "pixel_values_videos", ("video_grid_thw",)),
    )
    keeps_positions: ClassVar[bool] = True
    forwards_options: ClassVar[bool] = True
    traces: ClassVar[bool] = False
    inner: Layers | None = None  # where the reducer is in the tower's layers

    def __init__(self, core: Any, reducer: Reducer) -> None:
        self.needs = reducer.needs
        self.tower = Tower(reducer, len(core.visual.blocks), 0, class_token=False)
        self.window_index: Tensor | None = None
        for block in core.visual.blocks:
            check_free(block.attn)
            if not calls(type(block.attn).forward, "ALL_ATTENTION_FUNCTIONS"):
                raise TypeError(f"this transformers version builds {self.core} unlike 5.23, which is supported")

    @property
    def seconds(self) -> float:
        """What the tower's scores, or the reductions in its layers, took."""
        return self.tower.seconds + (0.0 if self.inner is None else self.inner.seconds)

    def swap(self, core: Any, swaps: Swaps) -> None:
        """Have the tower's attention note what passes through, where needed."""
        if not self.tower.needed and "vision" not in self.needs:
            return
        if hasattr(core.visual, "permute_input_for_window_attn"):
            swaps.swap(core.visual, self, _windowed)
        for layer, block in enumerate(core.visual.blocks):
            if self.tower.needed:
                watch = Watch(self.tower, layer, block.attn.num_heads)
                swaps.swap(block.attn, watch, watched)
                if "keys" in self.tower.notes:
                    swaps.swap(block.attn.qkv, watch, _projection)

    def reduce_in_layers(self, core: Any, reducer: Reducer, swaps: Swaps) -> None:
        """Put ``reducer`` into the tower's layers."""
        self.inner = Layers(reducer, self.core, core.visual)
        self.inner.swap(core.visual, swaps)

    def begin(self, core: Any, modality: Modality, arguments: dict[str, Any], *, unseen: bool) -> None:
        """The tower is about to run."""
        self.window_index = None
        self.tower.begin(len(core.visual.blocks) - 1)

    def visuals(self, core: Any, modality: Modality, arguments: dict[str, Any], output: Any) -> list[Visual]:
        """One for each image or video."""
        tower, merged = self.tower, core.visual.spatial_merge_size
        group = merged * merged
        raster = None if self.window_index is None else self.window_index.argsort()
        features = list(output.pooler_output)
        sizes = [len(x) for x in features]

        def tokens(x: Tensor) -> tuple[Tensor, ...]:
            """``[total,…]`` of patches as the tower runs them, to ``[1,N,…]`` of each image."""
            x = token_means(x, group)
            return (x if raster is None else x[raster])[None].split(sizes, 1)

        scores = {name: tokens(x.flatten()) for name, x in tower.scores.items()}
        keys, values = (None if x is None else tokens(x[0]) for x in (tower.keys, tower.values))
        vision = tokens(output.last_hidden_state) if "vision" in self.needs else None
        found = []
        for i, (image, (t, h, w)) in enumerate(zip(features, arguments[self._grid(modality)].tolist(), strict=True)):
            extra = {} if vision is None else {"vision": vision[i]}
            if "valid" in self.needs:
                extra["valid"] = torch.ones(1, len(image), dtype=torch.bool, device=image.device)
            if "crops" in self.needs:
                extra["crops"] = torch.zeros(2, dtype=torch.int64)
            merged_by_tower = None
            if self.inner is not None:
                left = self.inner.left[i]
                merged_by_tower = TokenMap.keep(left[None], len(image)), image[left][None]
            found.append(
                Visual(
                    image[None],
                    (t, h // merged, w // merged),
                    scores={name: x[i] for name, x in scores.items()},
                    keys=None if keys is None else keys[i],
                    values=None if values is None else values[i],
                    extra=extra,
                    merged=merged_by_tower,
                )
            )
        return found

    def _grid(self, modality: Modality) -> str:
        return f"{modality.name}_grid_thw"


class Qwen25VLFamily(Qwen2VLFamily):
    """Qwen2.5-VL."""

    module = "qwen2_5_vl.modeling_qwen2_5_vl"
    core = "Qwen2_5_VLModel"
    head = "Qwen2_5_VLForConditionalGeneration"


FAMILIES: tuple[type[Qwen2VLFamily], ...] = (Qwen2VLFamily, Qwen25VLFamily)


def _windowed(base: Any) -> dict[str, Callable[..., Any]]:
    def permute_input_for_window_attn(
        self: Any, input_tensor: Tensor, window_index: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        self._fastok.window_index = window_index
        return base.permute_input_for_window_attn(self, input_tensor, window_index, *args, **kwargs)

    return {"permute_input_for_window_attn": permute_input_for_window_attn}


def _projection(base: Any) -> dict[str, Callable[..., Any]]:
    def forward(self: Any, x: Tensor) -> Tensor:
        out: Tensor = base.forward(self, x)
        watch: Watch = self._fastok
        if watch.chunks is not None:
            watch.keys = out.unflatten(-1, (3, watch.heads, -1))[None, :, 1].detach()  # before rotary embedding
        return out

    return {"forward": forward}
