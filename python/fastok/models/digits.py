"""Digit-in-scene images: real handwritten digits pasted into photographs and clutter.

Each scene is a 112x112 RGB crop of one of scikit-learn's two sample photographs, covered with distractors (strokes,
blobs and pieces cut out of training digits) and with one whole handwritten digit of ``load_digits`` at a random place,
size and rotation on top. The task is to name the digit.

The training and the test split share neither digit images (a fixed random partition) nor photograph areas (the left
240 columns of both photographs test, the other 400 train). Nothing here depends on the rest of fastok.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

IMAGE_SIZE = 112
PATCH_SIZE = 8
NUM_CLASSES = 10
BACKGROUND = NUM_CLASSES
"""Patch label of a patch without the digit."""

PIXEL_MEAN = 0.5
PIXEL_STD = 0.5

MODEL_DIR = Path(__file__).resolve().parent / "digits_vit"
"""Folder of the shipped ViT, ready for ``ViTForImageClassification.from_pretrained``."""

_TEST_DIGITS = 397
_PHOTO_BORDER = 240
"""First photograph column of the training split; both photographs are 640 columns wide."""

_BLOCK = 100
"""Scenes per random stream in `DigitScenes.scenes`, so that any index range costs at most one block extra."""

_FRAGMENTS = 2
_STROKES = 4


class Scenes(NamedTuple):
    """A batch of scenes."""

    pixels: Tensor
    """float32 [n, 3, 112, 112], normalised to about [-1, 1]."""
    labels: Tensor
    """int64 [n], the digit."""
    patch_labels: Tensor
    """int64 [n, 196], the digit where it inks the patch and `BACKGROUND` elsewhere; row-major patches."""
    ink: Tensor
    """float32 [n, 112, 112] in [0, 1], how much of each pixel the digit covers."""
    glyphs: Tensor
    """float32 [n, 8, 8] in [0, 1], the digit image itself, upright."""


@lru_cache(maxsize=1)
def _sources() -> tuple[Tensor, Tensor, Tensor]:
    """Digit images float32 [1797, 1, 8, 8] and photographs float32 [2, 3, 427, 640], both in [0, 1]; labels [1797]."""
    try:
        from sklearn.datasets import load_digits, load_sample_images
    except ImportError as error:
        raise ImportError("the digit scenes need scikit-learn and pillow: pip install fastok[demo]") from error
    digits = load_digits()
    photos = np.stack(load_sample_images().images)
    return (
        torch.from_numpy(digits.images.astype(np.float32) / 16.0)[:, None],
        torch.from_numpy(photos.astype(np.float32) / 255.0).permute(0, 3, 1, 2).contiguous(),
        torch.from_numpy(digits.target.astype(np.int64)),
    )


def _uniform(generator: Generator, low: float, high: float, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator) * (high - low) + low


def _luminance(rgb: Tensor) -> Tensor:
    """[n, 3, ...] to [n, ...]."""
    return 0.299 * rgb[:, 0] + 0.587 * rgb[:, 1] + 0.114 * rgb[:, 2]


def _over(canvas: Tensor, alpha: Tensor, colour: Tensor) -> Tensor:
    """Paints ``colour`` [n, 3] with opacity ``alpha`` [n, 112, 112] over ``canvas`` [n, 3, 112, 112]."""
    return torch.lerp(canvas, colour[:, :, None, None].expand_as(canvas), alpha[:, None])


class DigitScenes:
    """Random scenes of one split, generated in batches.

    Args:
        split: ``"train"`` draws from 1,400 digit images and adds shape augmentation (stretch, shear, elastic bending,
            stroke thickness); ``"test"`` draws from the other 397 images and only places, sizes and rotates them.
    """

    def __init__(self, split: Literal["train", "test"]) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', got {split!r}")
        self.split = split
        images, photos, labels = _sources()
        order = torch.randperm(len(images), generator=Generator().manual_seed(0))
        chosen = order[:_TEST_DIGITS] if split == "test" else order[_TEST_DIGITS:]
        self._images, self._labels = images[chosen], labels[chosen]
        self._fragment_images = images[order[_TEST_DIGITS:]]
        area = photos[..., :_PHOTO_BORDER] if split == "test" else photos[..., _PHOTO_BORDER:]
        # One tall picture lets a single grid_sample serve a batch that mixes photographs, without copies per scene.
        self._photos = torch.cat(list(area), dim=1)
        self._photo_height = photos.shape[2]
        axis = torch.arange(IMAGE_SIZE, dtype=torch.float32) + 0.5
        self._x, self._y = axis[None, None, :], axis[None, :, None]

    def batch(self, n: int, generator: Generator, clutter: float = 1.0, min_size: float = 44.0) -> Scenes:
        """Draws ``n`` scenes from ``generator``.

        Args:
            clutter: chance factor in [0, 1] of each distractor; lower it for an easier start of training.
            min_size: smallest side of the digit in pixels, at most 64. Training goes lower than the default, to 32.
        """
        canvas = self._backgrounds(n, generator)
        canvas = self._paint_clutter(canvas, generator, clutter)
        pick = torch.randint(len(self._images), (n,), generator=generator)
        size = _uniform(generator, min_size, 64.0, n)
        alpha = self._ink(self._images[pick], size, generator, augment=self.split == "train")
        opacity = _uniform(generator, 0.85, 1.0, n, 1, 1)
        canvas = _over(canvas, alpha * opacity, self._ink_colour(canvas, alpha, generator))
        canvas = canvas + torch.randn(canvas.shape, generator=generator) * _uniform(generator, 0.0, 0.03, n, 1, 1, 1)
        labels = self._labels[pick]
        inked = F.avg_pool2d(alpha[:, None], PATCH_SIZE).flatten(1) > 0.1
        patch_labels = torch.where(inked, labels[:, None], BACKGROUND)
        pixels = (canvas.clamp(0.0, 1.0) - PIXEL_MEAN) / PIXEL_STD
        return Scenes(pixels, labels, patch_labels, alpha, self._images[pick, 0])

    def scenes(self, start: int, stop: int, seed: int = 0) -> Scenes:
        """Scenes ``start`` to ``stop`` of the endless sequence that (split, ``seed``) defines.

        A scene depends on its index alone, so ranges can be generated apart, in any order.
        """
        if not 0 <= start < stop:
            raise ValueError(f"need 0 <= start < stop, got {start} and {stop}")
        first = start // _BLOCK
        blocks = []
        for block in range(first, (stop - 1) // _BLOCK + 1):
            stream = np.random.SeedSequence([seed, block]).generate_state(1, np.uint64)
            blocks.append(self.batch(_BLOCK, Generator().manual_seed(int(stream[0]) >> 1)))
        window = slice(start - first * _BLOCK, stop - first * _BLOCK)
        return Scenes(*(torch.cat(parts)[window] for parts in zip(*blocks, strict=True)))

    def _backgrounds(self, n: int, generator: Generator) -> Tensor:
        """float32 [n, 3, 112, 112]: photograph crops with random side, flip, brightness, contrast and tint."""
        rows, columns = self._photos.shape[1:]
        side = _uniform(generator, 72.0, 224.0, n)
        left = torch.rand(n, generator=generator) * (columns - side)
        top = torch.rand(n, generator=generator) * (self._photo_height - side)
        top = top + torch.randint(rows // self._photo_height, (n,), generator=generator) * self._photo_height
        flip = torch.randint(2, (n,), generator=generator) * 2.0 - 1.0
        side, left, top, flip = (value[:, None, None] for value in (side, left, top, flip))
        x = (left + side * ((self._x / IMAGE_SIZE - 0.5) * flip + 0.5)) / columns * 2.0 - 1.0
        y = (top + side * self._y / IMAGE_SIZE) / rows * 2.0 - 1.0
        grid = torch.stack((x.expand(n, IMAGE_SIZE, IMAGE_SIZE), y.expand(n, IMAGE_SIZE, IMAGE_SIZE)), dim=-1)
        # The crops are laid end to end as one long picture, because the source is shared by the whole batch.
        crops = F.grid_sample(self._photos[None], grid.view(1, n * IMAGE_SIZE, IMAGE_SIZE, 2), align_corners=False)
        crops = crops[0].view(3, n, IMAGE_SIZE, IMAGE_SIZE).transpose(0, 1)
        contrast = _uniform(generator, 0.4, 1.1, n, 1, 1, 1)
        offset = _uniform(generator, -0.15, 0.15, n, 1, 1, 1) + _uniform(generator, -0.08, 0.08, n, 3, 1, 1)
        return ((crops - 0.5) * contrast + 0.5 + offset).clamp(0.0, 1.0)

    def _ink(self, images: Tensor, size: Tensor, generator: Generator, augment: bool) -> Tensor:
        """Opacity float32 [n, 112, 112] of ``images`` [n, 1, 8, 8] at random places and rotations, ``size`` [n] pixels.

        Bicubic upsampling of the real 8x8 pixels and a soft threshold give smooth strokes.
        """
        n = len(images)
        if n == 0:
            return torch.zeros(0, IMAGE_SIZE, IMAGE_SIZE)
        # Keeps the digit's box inside the picture; the corners that a rotation pushes out hold no ink.
        room = (IMAGE_SIZE - size).clamp(min=0.0)[:, None]
        centre = size[:, None] / 2 + torch.rand(n, 2, generator=generator) * room
        angle = _uniform(generator, -math.pi / 8, math.pi / 8, n)
        stretch = torch.ones(n, 2)
        shear = torch.zeros(n)
        threshold = _uniform(generator, 0.45, 0.55, n, 1, 1)
        if augment:
            stretch = _uniform(generator, 0.8, 1.25, n, 2)
            shear = _uniform(generator, -0.25, 0.25, n)
            threshold = _uniform(generator, 0.3, 0.6, n, 1, 1)
        cos, sin = torch.cos(angle), torch.sin(angle)
        # Inverse map, from the picture's to the digit's own [-1, 1] square.
        rows = torch.stack((torch.stack((cos - shear * sin, sin + shear * cos), 1), torch.stack((-sin, cos), 1)), 1)
        matrix = rows * (stretch * IMAGE_SIZE / size[:, None])[:, :, None]
        shift = -matrix @ (centre * (2.0 / IMAGE_SIZE) - 1.0)[:, :, None]
        grid = F.affine_grid(torch.cat((matrix, shift), 2), [n, 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
        if augment:
            bend = torch.randn(n, 2, 5, 5, generator=generator) * _uniform(generator, 0.0, 0.12, n, 1, 1, 1)
            bend = F.interpolate(bend, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=True)
            grid = grid + bend.permute(0, 2, 3, 1)
        ink = F.grid_sample(images, grid, mode="bicubic", align_corners=False)[:, 0]
        return ((ink - threshold) * 4.0 + 0.5).clamp(0.0, 1.0)

    def _ink_colour(self, canvas: Tensor, alpha: Tensor, generator: Generator) -> Tensor:
        """Random colours [n, 3], each clearly lighter or darker than what ``alpha`` covers."""
        n = len(canvas)
        covered = (_luminance(canvas) * alpha).sum((1, 2)) / alpha.sum((1, 2)).clamp(min=1.0)
        delta = _uniform(generator, 0.45, 0.7, n)
        lighter = torch.rand(n, generator=generator) < 0.5
        lighter = torch.where(covered + delta > 1.0, False, torch.where(covered - delta < 0.0, True, lighter))
        target = torch.where(lighter, covered + delta, covered - delta)
        tint = _uniform(generator, -0.25, 0.25, n, 3)
        return (target[:, None] + tint - _luminance(tint)[:, None]).clamp(0.0, 1.0)

    def _paint_clutter(self, canvas: Tensor, generator: Generator, chance: float) -> Tensor:
        """Paints strokes, blobs and pieces of training digits, each present with its own probability."""
        for _ in range(_STROKES):
            chosen = self._some(len(canvas), 0.5 * chance, generator)
            n = len(chosen)
            # A segment with round ends: a long one is a stroke, a short one a blob.
            x, y = _uniform(generator, 0.0, IMAGE_SIZE, 2, n, 1, 1)
            half = _uniform(generator, 0.0, 24.0, n, 1, 1)
            angle = _uniform(generator, -math.pi, math.pi, n, 1, 1)
            cos, sin = torch.cos(angle), torch.sin(angle)
            beyond = ((self._x - x) * cos + (self._y - y) * sin).abs_().sub_(half).clamp_(min=0.0)
            across = (self._y - y) * cos - (self._x - x) * sin
            radius = _uniform(generator, 1.5, 5.0, n, 1, 1)
            alpha = (radius + 0.5 - torch.hypot(beyond, across)).clamp_(0.0, 1.0)
            canvas[chosen] = _over(canvas[chosen], alpha, torch.rand(n, 3, generator=generator))
        axis = torch.linspace(-1.0, 1.0, 8)
        for _ in range(_FRAGMENTS):
            chosen = self._some(len(canvas), 0.6 * chance, generator)
            n = len(chosen)
            pick = torch.randint(len(self._fragment_images), (n,), generator=generator)
            # A straight cut keeps at most about a half of the digit, so that only one digit of the scene is whole.
            angle = _uniform(generator, -math.pi, math.pi, n, 1, 1)
            side = torch.cos(angle) * axis + torch.sin(angle) * axis[:, None]
            piece = self._fragment_images[pick] * (side > _uniform(generator, 0.0, 0.4, n, 1, 1))[:, None]
            alpha = self._ink(piece, _uniform(generator, 16.0, 28.0, n), generator, augment=False)
            under = canvas[chosen]
            canvas[chosen] = _over(under, alpha, self._ink_colour(under, alpha, generator))
        return canvas

    @staticmethod
    def _some(n: int, chance: float, generator: Generator) -> Tensor:
        """Indices of a random subset of ``n`` scenes, each taken with probability ``chance``."""
        return (torch.rand(n, generator=generator) < chance).nonzero().flatten()


def held_out(n: int = 2000, seed: int = 0) -> Scenes:
    """The first ``n`` test scenes of ``seed``, none of whose digits or photograph areas occur in training."""
    return DigitScenes("test").scenes(0, n, seed)
