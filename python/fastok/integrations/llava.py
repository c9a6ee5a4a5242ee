"""LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision: where their image tokens come from and how these are packed.

The tokens are what the projector returns, for each crop (or frame) in raster order. LLaVA-NeXT and OneVision then
stitch the crops of an image to one map, cut off what was padding and put a newline embedding behind each row; where a
token goes is read off the model's own packing, applied to numbers instead of features. OneVision may resample a large
stitched map: a token of the smaller one stands at the nearest place in its crop then, and other places are not valid.
In LLaVA-1.5, a reducer that goes by scores chooses among the tower's features, and only its choice is projected.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reducers.context import Reducer
from ..token_map import SoftMap, TokenMap
from .session import SHOWN, Session, check_needs
from .swap import Swaps
from .tower import Tower, Watch, watched
from .transformers import Encoder, encoder_of, patch
from .visual import Visual, merged_by
from .vlm import Modality

_IMAGE = Modality("image", "pixel_values", ("image_sizes", "vision_feature_layer", "vision_feature_select_strategy"))
_CROPPED = Modality("image", "pixel_values", (*_IMAGE.arguments, "batch_num_images"))
_VIDEO = Modality("video", "pixel_values_videos", ("vision_feature_layer", "vision_feature_select_strategy"))


def _as_they_are(x: Tensor) -> Tensor:
    return x


@dataclass(eq=False)
class _Run:
    """What one run of the vision tower made, for all crops of all images.

    Attributes:
        tokens: ``[crops,N,C]``, the projector's output. vision: its input.
        classes: ``[crops,C_v]``, the class token's features, if there is one.
        side: N is side * side, if it is a square.
    """

    tokens: Tensor
    vision: Tensor
    classes: Tensor | None
    tower: Tower
    needs: tuple[str, ...]
    merged: tuple[TokenMap | SoftMap, Tensor] | None

    @property
    def side(self) -> int | None:
        side = math.isqrt(self.tokens.shape[1])
        return side if side * side == self.tokens.shape[1] else None

    def visual(
        self, features: Tensor, crops: slice, shown: Callable[[Tensor], Tensor] = _as_they_are, **more: Any
    ) -> Visual:
        """The image of these crops; ``shown`` is what is done to everything that has a value for each token."""

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else shown(x[crops])

        tower, extra = self.tower, {}
        if self.merged is not None:
            if shown is not _as_they_are:
                raise NotImplementedError(
                    "place='layers': required, tokens that are pooled or resampled after the tower; supported, images "
                    "that are not; use place='output'"
                )
            more["merged"] = (_of_rows(self.merged[0], crops), self.merged[1][crops])
        if "vision" in self.needs:
            extra["vision"] = shown(self.vision[crops])
        if "vision_cls" in self.needs and self.classes is not None:
            extra["vision_cls"] = self.classes[crops]
        extra |= more.pop("extra", {})
        tokens = shown(self.tokens[crops]) if more.get("hidden") is None else more.pop("hidden")
        if "valid" in self.needs and "valid" not in extra:
            extra["valid"] = torch.ones(tokens.shape[:2], dtype=torch.bool, device=features.device)
        if "crops" in self.needs and "crops" not in extra:
            extra["crops"] = torch.zeros(2, dtype=torch.int64)
        side = self.side
        return Visual(
            tokens,
            more.pop("grid", None if side is None else (1, side, side)),
            scores={name: shown(scores[crops][..., None])[..., 0] for name, scores in tower.scores.items()},
            keys=cut(tower.keys),
            values=cut(tower.values),
            extra=extra,
            **more,
        )


class LlavaFamily:
    """LLaVA-1.5, and what the others have in common with it."""

    module: ClassVar[str] = "llava.modeling_llava"
    core: ClassVar[str] = "LlavaModel"
    head: ClassVar[str] = "LlavaForConditionalGeneration"
    modalities: ClassVar[tuple[Modality, ...]] = (_IMAGE,)
    keeps_positions: ClassVar[bool] = False
    forwards_options: ClassVar[bool] = False
    traces: ClassVar[bool] = True
    early: ClassVar[bool] = True  # what reaches the projector is what a reducer is shown: no packing to come
    inner: Session | None = None  # where the reducer is in the tower's layers

    def __init__(self, core: Any, reducer: Reducer) -> None:
        self.encoder: Encoder | None = encoder_of(core.vision_tower)
        self.reducer = reducer
        self.needs = reducer.needs
        self.chooses = False
        special = 1 if core.config.vision_feature_select_strategy == "default" else 0
        layers = [] if self.encoder is None else self.encoder.layers
        class_token = special == 1 if self.encoder is None else self.encoder.class_token
        self.tower = Tower(reducer, max(len(layers), 1), special, class_token)
        self.projected: tuple[Tensor, Tensor] | None = None
        self.merged: tuple[TokenMap | SoftMap, Tensor] | None = None
        if not self.tower.needed:
            return
        if self.encoder is None or self.encoder.special != special:
            raise NotImplementedError(
                f"{type(reducer).__name__} in {self.core}: required, {', '.join(self.tower.names + self.tower.notes)} "
                "of the vision tower; supported, CLIPVisionModel with vision_feature_select_strategy='default', "
                f"SiglipVisionModel with 'full'; got {type(core.vision_tower).__name__} with "
                f"{core.config.vision_feature_select_strategy!r}"
            )

    @property
    def seconds(self) -> float:
        """What the tower's scores, or the reductions in its layers, took."""
        return self.tower.seconds + (0.0 if self.inner is None else self.inner.reducing)

    def swap(self, core: Any, swaps: Swaps) -> None:
        """Have the projector and, where needed, the tower's attention note what passes through."""
        swaps.swap(core.multi_modal_projector, self, _projector)
        if self.tower.needed and self.encoder is not None:
            for layer, attention in enumerate(self.encoder.attentions):
                swaps.swap(attention, Watch(self.tower, layer), watched)

    def reduce_in_layers(self, core: Any, reducer: Reducer, swaps: Swaps) -> None:
        """Put ``reducer`` into the tower's layers."""
        if self.encoder is None:
            raise TypeError(f"no layers to reduce in are known of {type(core.vision_tower).__name__}")
        layers = core.config.vision_feature_layer
        if not isinstance(layers, int) and len(set(layers)) > 1:
            raise NotImplementedError(
                f"vision_feature_layer: required, features of the layers {list(layers)} side by side, which have "
                "different tokens; supported with place='layers', those of one layer; use place='output'"
            )
        check_needs(reducer, "in an encoder's layers", SHOWN)
        self.inner = patch(core.vision_tower, core.vision_tower, reducer, swaps)
        self.inner.records = True

    def begin(self, core: Any, modality: Modality, arguments: dict[str, Any], *, unseen: bool) -> None:
        """The projector and the tower are about to run.

        A reducer that goes by scores chooses before the projector, where a call's features are ``unseen`` by others.
        """
        given, own = arguments.get("vision_feature_select_strategy"), core.config.vision_feature_select_strategy
        if given is not None and given != own:
            raise NotImplementedError(
                f"vision_feature_select_strategy: required, {given!r}; supported, {own!r} as in the config at apply"
            )
        last = _last(core, arguments)
        n = self.tower.n_layers
        self.tower.begin(n + last if last < 0 else last - 1)
        one_each = self.early and arguments.get("image_sizes") is None
        compiling = torch.compiler.is_compiling()
        self.chooses = unseen and one_each and not compiling and getattr(self.reducer, "by_scores", False)

    def visuals(self, core: Any, modality: Modality, arguments: dict[str, Any], output: Any) -> list[Visual]:
        """One for each image."""
        images = list(output.pooler_output)
        run = self._run(core, arguments, output)
        if len(run.tokens) == len(images):
            return [run.visual(x, slice(i, i + 1)) for i, x in enumerate(images)]
        # A tower without a batch dimension, which has packed images of different sizes.
        grids = torch.as_tensor(arguments["image_sizes"]) // core.vision_tower.patch_size
        starts = [0, *grids.prod(-1).cumsum(0).tolist()]

        def part(features: Tensor, start: int, stop: int, grid: list[int]) -> Visual:
            return run.visual(features, slice(0, 1), lambda x: x[:, start:stop], grid=(1, *grid))

        return list(map(part, images, starts, starts[1:], grids.tolist()))

    def _run(self, core: Any, arguments: dict[str, Any], output: Any) -> _Run:
        assert self.projected is not None
        (vision, tokens), self.projected = self.projected, None
        classes = None
        if self.tower.class_token and self.tower.special:
            classes = torch.cat([output.hidden_states[layer][:, 0] for layer in _layers(core, arguments)], -1)
        merged, self.merged = self.merged, None
        return _Run(tokens, vision, classes, self.tower, self.needs, merged)

    def project(self, vision: Tensor, projector: Callable[[Tensor], Tensor]) -> Tensor:
        """``projector`` of the tower's features; a token for each that the tower was given, if fewer are projected."""
        token_map, kept = None, vision
        if self.inner is not None:
            token_map = _behind(self.inner.composed(self.tower.feature + 1), self.tower.special)
        elif self.chooses:
            started = perf_counter()
            run = _Run(vision, vision, None, self.tower, self.needs, None)
            token_map, kept = merged_by(run.visual(vision, slice(None)), self.reducer, None, False)
            self.tower.seconds += perf_counter() - started
        tokens = projector(kept)
        if token_map is not None:
            self.merged = token_map, tokens
            tokens = token_map.unmerge(tokens)
        self.projected = vision, tokens
        return tokens


class LlavaNextFamily(LlavaFamily):
    """LLaVA-NeXT: a thumbnail, and crops stitched to one map."""

    module = "llava_next.modeling_llava_next"
    core = "LlavaNextModel"
    traces = False
    early = False
    head = "LlavaNextForConditionalGeneration"

    def visuals(self, core: Any, modality: Modality, arguments: dict[str, Any], output: Any) -> list[Visual]:
        """One for each image, however many crops it has."""
        run, found, at = self._run(core, arguments, output), [], 0
        functions = sys.modules[f"transformers.models.{self.module}"]
        pinpoints, size = core.config.image_grid_pinpoints, core.config.vision_config.image_size
        images, sizes = output.pooler_output, arguments["image_sizes"]
        for features, image_size, cropped in zip(images, sizes, self._cropped(arguments, len(images)), strict=False):
            count = functions.image_size_to_num_patches(image_size, pinpoints, size) if cropped else 1
            crops = (0, 0)
            if count > 1:
                crops = functions.get_anyres_image_grid_shape(image_size, pinpoints, size)
            found.append(self._image(core, run, features, slice(at, at + count), image_size, crops, arguments))
            at += count
        return found

    def _cropped(self, arguments: dict[str, Any], images: int) -> list[bool]:
        """Whether each image was cut into crops."""
        return [True] * images

    def _packed(self, core: Any, numbers: Tensor, image_size: Any, newline: Tensor) -> Tensor:
        """The model's packing of ``numbers[crops,N,1]``, not resampled."""
        packed, _ = core.pack_image_features(
            [numbers], [image_size], vision_feature_select_strategy="default", image_newline=newline
        )
        return packed[0]

    def _image(
        self,
        core: Any,
        run: _Run,
        features: Tensor,
        crops: slice,
        image_size: Any,
        grid: tuple[int, int],
        arguments: dict[str, Any],
    ) -> Visual:
        shape = run.tokens[crops].shape[:2]
        numbers = torch.arange(shape[0] * shape[1], device=features.device).view(*shape, 1)
        packed = self._packed(core, numbers, image_size, numbers.new_full((1,), -1))[:, 0]
        extra: dict[str, Tensor] = {}
        if "crops" in self.needs:
            extra["crops"] = torch.tensor(grid)
        if len(packed) == len(features):
            return run.visual(features, crops, packed=packed, extra=extra | self._valid(packed, shape))
        return self._resampled(run, features, crops, packed, extra, arguments.get("vision_aspect_ratio"), core)

    def _resampled(
        self, run: _Run, features: Tensor, crops: slice, packed: Tensor, extra: Any, ratio: str | None, core: Any
    ) -> Visual:
        raise ValueError(f"{len(features)} features of an image that {self.core} packs to {len(packed)}")

    def _valid(self, packed: Tensor, shape: torch.Size) -> dict[str, Tensor]:
        if "valid" not in self.needs:
            return {}
        valid = torch.zeros(shape[0] * shape[1] + 1, dtype=torch.bool, device=packed.device)
        return {"valid": valid.index_fill(0, packed + 1, True)[1:].view(shape)}


class LlavaOnevisionFamily(LlavaNextFamily):
    """LLaVA-OneVision: as LLaVA-NeXT, with one crop for each of several images, large maps resampled, and videos."""

    module = "llava_onevision.modeling_llava_onevision"
    core = "LlavaOnevisionModel"
    head = "LlavaOnevisionForConditionalGeneration"
    modalities = (_CROPPED, _VIDEO)

    def visuals(self, core: Any, modality: Modality, arguments: dict[str, Any], output: Any) -> list[Visual]:
        """One for each image or video."""
        if modality.name == "image":
            return super().visuals(core, modality, arguments, output)
        run, videos = self._run(core, arguments, output), output.pooler_output
        frames = len(run.tokens) // max(len(videos), 1)
        sides = (1, *(math.ceil(run.side / 2) for _ in range(2))) if run.side is not None else None

        def pooled(x: Tensor) -> Tensor:
            flat = core.apply_pooling(x.flatten(2).to(torch.promote_types(x.dtype, run.tokens.dtype)))
            return flat.unflatten(-1, x.shape[2:]).to(x.dtype)

        found = []
        for i, features in enumerate(videos):
            packed = torch.arange(len(features), device=features.device)
            packed[-1] = -1  # the newline
            crops = slice(i * frames, (i + 1) * frames)
            found.append(run.visual(features, crops, pooled, grid=sides, packed=packed, ordered=frames))
        return found

    def _cropped(self, arguments: dict[str, Any], images: int) -> list[bool]:
        counts = arguments.get("batch_num_images")
        return [True] * images if counts is None else [n == 1 for n in counts for _ in range(n)]

    def _packed(self, core: Any, numbers: Tensor, image_size: Any, newline: Tensor) -> Tensor:
        # Room for as many crops as there are, and so nothing to resample.
        room = f"anyres_max_{len(numbers) + 1}"
        packed, _ = core.pack_image_features([numbers], [image_size], newline, room)
        return packed[0]

    def _resampled(
        self, run: _Run, features: Tensor, crops: slice, packed: Tensor, extra: Any, ratio: str | None, core: Any
    ) -> Visual:
        shape = run.tokens[crops].shape[:2]
        n = shape[1]
        height = int((packed < 0).sum())
        index = packed[n:].view(height, -1)[:, :-1]
        most = int((core.config.vision_aspect_ratio if ratio is None else ratio).removeprefix("anyres_max_"))
        factor = math.sqrt(index.numel() / (most * n))
        size = (int(height // factor), int(index.shape[1] // factor))
        rows, columns = (
            ((torch.arange(new, device=index.device) + 0.5) * (old / new)).long()
            for new, old in zip(size, index.shape, strict=True)
        )
        nearest = index[rows[:, None], columns]
        small = F.pad(nearest, (0, 1), value=-1).flatten()
        if n + len(small) != len(features):
            return super()._resampled(run, features, crops, packed, extra, ratio, core)
        packed = torch.cat([packed[:n], small])

        def shown(x: Tensor) -> Tensor:
            flat = x.flatten(2).flatten(0, 1)
            image = flat[index.flatten()].unflatten(0, index.shape).permute(2, 0, 1)[None]
            new = F.interpolate(image, size=size, mode="bilinear")[0].flatten(1).mT
            return flat.index_copy(0, nearest.flatten(), new).view_as(x)

        extra = extra | self._valid(packed, shape)
        tokens = run.tokens[crops].flatten(0, 1)
        hidden = tokens.index_copy(0, nearest.flatten(), features[packed >= 0][n:].to(tokens)).view(*shape, -1)
        return run.visual(features, crops, shown, hidden=hidden, packed=packed, extra=extra)


def _layers(core: Any, arguments: dict[str, Any]) -> list[int]:
    """The hidden states that make the feature, side by side."""
    layers = arguments.get("vision_feature_layer")
    layers = core.config.vision_feature_layer if layers is None else layers
    return [layers] if isinstance(layers, int) else list(layers)


def _last(core: Any, arguments: dict[str, Any]) -> int:
    """The last of them."""
    return _layers(core, arguments)[-1]


def _behind(token_map: TokenMap | SoftMap, special: int) -> TokenMap | SoftMap:
    """The map of the patches, without ``special`` tokens in front, which stay in front."""
    if isinstance(token_map, SoftMap):
        return SoftMap.from_dense(token_map.dense()[:, special:, special:])
    assign = token_map.assign[:, special:]
    assign = torch.where(assign < special, -1, assign - special)
    return TokenMap.from_assign(assign, token_map.n_out - special, token_map.counts - special)


def _of_rows(token_map: TokenMap | SoftMap, rows: slice) -> TokenMap | SoftMap:
    if isinstance(token_map, SoftMap):
        return SoftMap.from_dense(token_map.dense()[rows])
    return TokenMap.from_assign(token_map.assign[rows], token_map.n_out, token_map.counts[rows])


def _projector(base: Any) -> dict[str, Callable[..., Any]]:
    def forward(self: Any, image_features: Tensor) -> Tensor:
        tokens: Tensor = self._fastok.project(image_features, partial(base.forward, self))
        return tokens

    return {"forward": forward}


FAMILIES: tuple[type[LlavaFamily], ...] = (LlavaFamily, LlavaNextFamily, LlavaOnevisionFamily)
