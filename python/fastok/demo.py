"""The main job behind ``make demo``: accuracy and speed with and without fewer tokens, and a picture of the tokens."""

import importlib.util
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastok

from .models import digits
from .reducers import EViT, ToMe
from .reducers.tome import Rate
from .testing.bench import time_us

try:
    from PIL import Image, ImageOps
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ImportError as error:
    raise ImportError("the demo needs more packages: pip install fastok[demo]") from error

from . import viz

Method = Rate | EViT | None
"""A ToMe schedule, another reducer, or None for the unreduced model."""

METHODS: tuple[Method, ...] = (8, 16, (16, -1.0), 28, EViT(0.7))
RATIOS = (0.75, 0.5, 0.25, 0.125)
BATCH = 50

_PHOTO_PATCHES = 600
"""About how many patches a photo is cut into: more than a scene has, so that small things can be told apart."""


@dataclass(frozen=True)
class Shape:
    """A ViT with patches of 16 pixels to be timed, with the published r and the images per batch."""

    name: str
    image: int
    layers: int
    heads: int
    width: int
    r: int
    on_cpu: int
    on_gpu: int


SHAPES = (
    Shape("ViT-B/16-224", 224, 12, 12, 768, 16, 4, 64),
    Shape("ViT-L/16-384", 384, 24, 16, 1024, 23, 1, 16),
)
SHAPE_SECONDS = 15.0
SHAPE_ROUNDS = 100


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def transformers() -> Any:
    """The transformers library, without its own progress bars; imported late, because that takes seconds."""
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("the demo needs transformers: pip install fastok[demo]")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


def load_model(folder: Path = digits.MODEL_DIR) -> Any:
    """The ViT for `digits.DigitScenes` that ships with fastok, in fp32, on the GPU if there is one.

    Raises:
        FileNotFoundError: there is no model in ``folder``.
    """
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"no model in {folder}; train one: python examples/train_digit_vit.py --out {folder}")
    model = transformers().ViTForImageClassification.from_pretrained(folder, dtype=torch.float32)
    return model.eval().to(device())


def label(method: Method) -> str:
    """The method, a ToMe schedule as the command line takes it."""
    if method is None:
        return "unreduced"
    if isinstance(method, EViT):
        return f"EViT keep={method.keep:g}"
    if isinstance(method, tuple):
        return f"r={method[0]}:{method[1]:g}"
    return f"r={','.join(map(str, method))}" if isinstance(method, list) else f"r={method}"


def timed(model: Any, pixels: Tensor) -> tuple[Tensor, float]:
    """The logits, and the seconds they took."""
    logits: list[Tensor] = []
    microseconds = time_us(lambda: logits.append(model(pixels).logits), pixels.device)
    return logits[0], microseconds / 1e6


class Race:
    """One model under several methods, timed on the same batches in turn.

    Attributes:
        methods: None is the unreduced model.
        seconds: per method, seconds per image of each batch so far.
        tokens: per method, tokens left after the last layer, the class token included.
    """

    def __init__(self, model: Any, methods: Sequence[Method]) -> None:
        self.model = model
        self.methods = list(methods)
        self.seconds: list[list[float]] = [[] for _ in methods]
        self.tokens = [0] * len(self.methods)

    @torch.inference_mode()
    def step(self, pixels: Tensor) -> list[Tensor]:
        """The logits of one batch under each method. The first step also runs each once before, untimed."""
        rounds, n = len(self.seconds[0]), len(self.methods)
        if rounds == 0:
            for which in range(n):
                self._forward(which, pixels)
        logits = {}
        for which in ((rounds + i) % n for i in range(n)):  # each takes its turn to be the first
            logits[which], seconds = self._forward(which, pixels)
            self.seconds[which].append(seconds / len(pixels))
        return [logits[which] for which in range(n)]

    def _forward(self, which: int, pixels: Tensor) -> tuple[Tensor, float]:
        method = self.methods[which]
        if method is None:
            self.tokens[which] = (pixels.shape[-1] // self.model.config.patch_size) ** 2 + 1
            return timed(self.model, pixels)
        with fastok.apply(self.model, method if isinstance(method, EViT) else ToMe(method)) as handle:
            result = timed(self.model, pixels)
            self.tokens[which] = handle.token_map.n_out
        return result

    def rows(self) -> list["Row"]:
        """What was measured; the first method is what speed-ups are over."""
        medians = [statistics.median(seconds) for seconds in self.seconds]
        return [
            Row(label(method), tokens, 1 / median, medians[0] / median)
            for method, tokens, median in zip(self.methods, self.tokens, medians, strict=True)
        ]


@dataclass(frozen=True)
class Row:
    """One method's line in a table."""

    method: str
    tokens: int
    images_per_s: float
    speed_up: float
    top1: float = math.nan


def evaluate(model: Any, methods: Sequence[Method], scenes: int, progress: Progress) -> list[Row]:
    """Accuracy and speed on the first held-out scenes: unreduced, then under each method."""
    race = Race(model, [None, *methods])
    hits = [0] * len(race.methods)
    task = progress.add_task(f"{scenes} held-out scenes", total=scenes)
    source = digits.DigitScenes("test")
    for start in range(0, scenes, 2 * BATCH):
        drawn = source.scenes(start, min(start + 2 * BATCH, scenes))  # all at once: 100 are made at a time
        for pixels, labels in zip(drawn.pixels.split(BATCH), drawn.labels.to(device()).split(BATCH), strict=True):
            for which, logits in enumerate(race.step(pixels.to(device()))):
                hits[which] += int((logits.argmax(1) == labels).sum())
            progress.advance(task, len(labels))
    return [replace(row, top1=hit / scenes) for row, hit in zip(race.rows(), hits, strict=True)]


def time_shape(shape: Shape, batch: int, progress: Progress) -> list[Row]:
    """Speed of the shape with random weights, unreduced and reduced; in bf16 on a GPU, else in fp32."""
    task = progress.add_task(f"{shape.name}, r={shape.r}", total=SHAPE_SECONDS)
    config = transformers().ViTConfig(
        image_size=shape.image,
        patch_size=16,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        hidden_size=shape.width,
        intermediate_size=4 * shape.width,
        num_labels=1000,
    )
    dtype = torch.bfloat16 if device().type == "cuda" else torch.float32
    with torch.device(device()):
        model = transformers().ViTForImageClassification(config).eval().to(dtype)
        pixels = torch.randn(batch, 3, shape.image, shape.image, dtype=dtype)
    race = Race(model, [None, shape.r])
    start, elapsed = time.perf_counter(), 0.0
    while len(race.seconds[0]) < 3 or (elapsed < SHAPE_SECONDS and len(race.seconds[0]) < SHAPE_ROUNDS):
        race.step(pixels)
        elapsed = time.perf_counter() - start
        progress.update(task, completed=elapsed)
    return race.rows()


def schedule_to(ratio: float, patches: int, layers: int) -> list[int]:
    """Tokens to merge in each layer so that ``ratio`` of the patches is left, every layer keeping the same share."""
    left = [round(patches * ratio ** (layer / layers)) for layer in range(layers + 1)]
    return [before - after for before, after in pairwise(left)]


def photo_grid(image: Image.Image) -> tuple[int, int]:
    """Rows and columns of about square patches, `_PHOTO_PATCHES` in all or so."""
    scale = math.sqrt(_PHOTO_PATCHES / (image.width * image.height))
    return max(1, round(image.height * scale)), max(1, round(image.width * scale))


def draw_merged(
    model: Any, image: Image.Image, grid: tuple[int, int], ratios: Sequence[float], style: viz.Style = "mean"
) -> tuple[list[Image.Image], list[str]]:
    """The image as it is and with its tokens merged down to each of ``ratios`` by ``model``; and the captions."""
    rows, columns = grid
    patch = model.config.patch_size
    fitted = image.resize((columns * patch, rows * patch), Image.Resampling.BICUBIC)
    values = torch.from_numpy(np.array(fitted)).permute(2, 0, 1)[None].to(device()) / 255
    pixels = (values - digits.PIXEL_MEAN) / digits.PIXEL_STD
    drawings, captions = [], []
    for ratio in ratios:
        merge = ToMe(schedule_to(ratio, rows * columns, model.config.num_hidden_layers))
        with fastok.apply(model, merge) as handle, torch.inference_mode():
            model(pixels, interpolate_pos_encoding=True)
            token_map = handle.token_map
        drawings.append(viz.draw_tokens(image, token_map, grid, prefix=1, style=style))
        captions.append(f"{token_map.n_out - 1} of {rows * columns} tokens")
    original = image.resize(drawings[0].size, Image.Resampling.LANCZOS)
    return [original, *drawings], ["original", *captions]


def open_photo(path: Path) -> Image.Image:
    """The picture in a file, upright, RGB.

    Raises:
        OSError: it cannot be read; the message names the file.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise OSError(f"{path}: no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(f"{path}: not a readable picture ({error})") from None


def sample_photo() -> Image.Image:
    """A flower, from scikit-learn."""
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image("flower.jpg"))


def scene_images(count: int) -> list[Image.Image]:
    """The first held-out scenes as pictures."""
    pixels = digits.held_out(count).pixels * digits.PIXEL_STD + digits.PIXEL_MEAN
    return [Image.fromarray(scene) for scene in (pixels * 255).round().byte().permute(0, 2, 3, 1).numpy()]


def draw_demo(model: Any, photo: Image.Image) -> Image.Image:
    """A photo and two scenes, a row each: the original, then merged down to each of `RATIOS`."""
    side = digits.IMAGE_SIZE // digits.PATCH_SIZE
    rows = [(photo, photo_grid(photo)), *((scene, (side, side)) for scene in scene_images(2))]
    pictures, captions = [], []
    for image, grid in rows:
        more_pictures, more_captions = draw_merged(model, image, grid, RATIOS)
        pictures += more_pictures
        captions += more_captions
    return viz.picture_grid(pictures, captions, columns=1 + len(RATIOS))


def _progress(console: Console) -> Progress:
    """A bar that disappears when its part is done."""
    return Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True)


def _speed(row: Row) -> tuple[str, str]:
    digits_shown = 0 if row.images_per_s >= 100 else 1 if row.images_per_s >= 10 else 2
    return f"{row.images_per_s:.{digits_shown}f}", f"{row.speed_up:.2f}x"


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("model", "method") else "right")
    return table


def print_accuracy(model: Any, methods: Sequence[Method], scenes: int) -> None:
    """Run `evaluate` with a progress bar and print its table."""
    console = Console()
    with _progress(console) as progress:
        rows = evaluate(model, methods, scenes, progress)
    headings = ("method", "tokens left", "top-1", "accuracy kept", "images/s", "speed-up")
    table = _table(
        f"The shipped ViT on {scenes} held-out scenes, reduced by ToMe (r) and EViT without training", *headings
    )
    for row in rows:
        kept = f"{row.top1 / rows[0].top1:.1%}" if rows[0].top1 else "-"
        table.add_row(row.method, str(row.tokens), f"{row.top1:.1%}", kept, *_speed(row))
    console.print(table)


def print_speed() -> None:
    """Time `SHAPES` with a progress bar and print the table."""
    console = Console()
    headings = ("model", "batch", "method", "tokens left", "images/s", "speed-up")
    table = _table("ViT shapes with random weights: speed only", *headings)
    with _progress(console) as progress:
        for shape in SHAPES:
            batch = shape.on_gpu if device().type == "cuda" else shape.on_cpu
            for row in time_shape(shape, batch, progress):
                table.add_row(shape.name, str(batch), row.method, str(row.tokens), *_speed(row))
    console.print(table)


def run(model: Any, photo: Image.Image, out: Path, scenes: int) -> None:
    """The whole demo: accuracy, speed, picture."""
    where = torch.cuda.get_device_name() if device().type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"running on {where}")
    print_accuracy(model, METHODS, scenes)
    print_speed()
    viz.save(draw_demo(model, photo), out)
    print(f"picture: {out}")
