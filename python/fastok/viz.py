"""Pictures of token maps: which patches of an image became one token. Needs Pillow only; imported on demand."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .token_map import SoftMap, TokenMap

try:
    from PIL import Image, ImageDraw, ImageFont
except ImportError as error:
    raise ImportError("fastok.viz draws with Pillow: pip install fastok[viz]") from error

Style = Literal["mean", "outline", "color"]

_BORDER = (250, 250, 250)
_INK = (35, 38, 45)
_FAINT = (150, 156, 166)
_GRID = (226, 229, 233)
_BAR = (62, 121, 196)
_DROPPED = 0.2
"""What is left of a dropped token's brightness."""

_TINT = 0.6
"""Opacity of a merged token's colour in the style ``"color"``."""


def draw_tokens(
    image: Image.Image,
    token_map: TokenMap | SoftMap,
    grid: tuple[int, int],
    *,
    prefix: int = 0,
    sample: int = 0,
    style: Style = "mean",
    side: int = 448,
) -> Image.Image:
    """The image with each output token's patches drawn as one, and thin borders between different tokens.

    Args:
        image: the picture that the patches were cut from, of any size; stretched so that the grid fits it.
        token_map: from ``prefix + h * w`` input tokens, for instance ``handle.token_map`` after a forward.
        grid: (h, w), rows and columns of patches.
        prefix: number of tokens in front of the patches (class, distillation, registers), which are not drawn.
        sample: which sample of the batch.
        style: ``"mean"`` fills each token with the mean colour of its patches; ``"outline"`` leaves the picture as it
            is between the borders; ``"color"`` also tints each token of more than one patch in a colour of its own,
            which shows patches that belong together without touching.
        side: length of the drawing's longer side in pixels, rounded to a whole number (at least 4) per patch.

    Returns:
        An RGB picture of h by w cells. Dropped tokens are darkened.

    Raises:
        TypeError: a `SoftMap`, whose tokens are no sets of patches.
        ValueError: a grid, prefix, sample, style or side that does not fit.
    """
    return _drawn(image, _patch_slots(token_map, grid, prefix, sample).reshape(grid), style, side)


def draw_patches(image: Image.Image, slots: Tensor, *, style: Style = "mean", side: int = 448) -> Image.Image:
    """As `draw_tokens`, from the token that each patch went into: what `fastok.apply` did to a vision-language model.

    ``[[viz.draw_patches(image, slots) for slots in pictures] for pictures in handle.patches]`` draws all of a prompt.

    Args:
        image: what the model was shown as this picture (of a video, the frame), of any size.
        slots: integer ``[h,w]``, -1 for dropped patches, for instance one of ``handle.patches``.
        style, side: see `draw_tokens`.

    Returns:
        An RGB picture of h by w cells. Dropped patches are darkened.

    Raises:
        TypeError: slots that are no integers. ValueError: an empty grid, slots below -1, a style or side that does not
            fit.
    """
    if slots.is_floating_point() or slots.is_complex() or slots.dtype == torch.bool:
        raise TypeError(f"slots must be integers, got {slots.dtype}")
    if slots.dim() != 2 or slots.numel() == 0 or int(slots.min()) < -1:
        raise ValueError(f"slots must be [h,w] of numbers >= -1, at least one, got {list(slots.shape)}")
    return _drawn(image, slots.cpu().numpy().astype(np.int64), style, side)


def _drawn(image: Image.Image, cells: NDArray[np.int64], style: Style, side: int) -> Image.Image:
    """The picture of ``cells[h,w]``, -1 for dropped."""
    if style not in get_args(Style):
        raise ValueError(f"style must be one of {', '.join(get_args(Style))}; got {style!r}")
    if side < 1:
        raise ValueError(f"side must be >= 1, got {side}")
    slots, grid, n_out = cells.ravel(), cells.shape, max(int(cells.max()) + 1, 1)
    rows, columns = grid
    pixels = _stretched(image, grid, side)
    height, width = pixels.shape[0] // rows, pixels.shape[1] // columns

    kept = slots >= 0
    patches = pixels.reshape(rows, height, columns, width, 3).mean((1, 3)).reshape(-1, 3)
    counts = np.bincount(slots[kept], minlength=n_out)
    if style == "mean":
        sums = np.stack([np.bincount(slots[kept], channel[kept], n_out) for channel in patches.T], -1)
        fill, opacity = (sums / np.maximum(counts, 1)[:, None])[slots], np.where(kept, 1.0, 0.0)
    elif style == "color":
        fill, opacity = _distinct_colours(n_out)[slots], np.where(kept & (counts[slots] > 1), _TINT, 0.0)
    else:
        fill, opacity = patches, np.zeros(len(slots))

    def per_pixel(values: NDArray[np.float64]) -> NDArray[np.float64]:
        cells = values.reshape(rows, columns, -1)
        return cells.repeat(height, 0).repeat(width, 1)

    cover = per_pixel(opacity)
    drawn = pixels * per_pixel(np.where(kept, 1.0, _DROPPED)) * (1 - cover) + per_pixel(fill) * cover
    drawn[_borders(cells, height, width)] = _BORDER
    return Image.fromarray(np.rint(drawn).astype(np.uint8))


def _patch_slots(token_map: TokenMap | SoftMap, grid: tuple[int, int], prefix: int, sample: int) -> NDArray[np.int64]:
    """int64 [h*w]: the output token of each patch, -1 where dropped."""
    if not isinstance(token_map, TokenMap):
        raise TypeError(f"token_map must be a TokenMap, got a {type(token_map).__name__}: its tokens overlap")
    if len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"grid must be (rows, columns), both >= 1, got {grid}")
    rows, columns = grid
    if prefix < 0:
        raise ValueError(f"prefix must be >= 0, got {prefix}")
    if token_map.n_in != prefix + rows * columns:
        raise ValueError(
            f"token_map has N={token_map.n_in} input tokens, but prefix={prefix} and grid={rows}x{columns} make "
            f"{prefix + rows * columns}"
        )
    if not 0 <= sample < token_map.batch_size:
        raise ValueError(f"sample must be within [0, {token_map.batch_size}), got {sample}")
    slots: NDArray[np.int64] = token_map.assign[sample, prefix:].cpu().numpy().astype(np.int64)
    return slots


def _stretched(image: Image.Image, grid: tuple[int, ...], side: int) -> NDArray[np.float64]:
    """[H,W,3], about ``side`` long, a whole number of pixels per patch each way."""
    rows, columns = grid
    scale = side / max(image.size)
    width = max(4, round(image.width * scale / columns))
    height = max(4, round(image.height * scale / rows))
    # A box repeats pixels where it enlarges and averages them where it shrinks: crisp, and means stay exact.
    fitted = image.convert("RGB").resize((columns * width, rows * height), Image.Resampling.BOX)
    return np.asarray(fitted, dtype=np.float64)


def _borders(slots: NDArray[np.int64], height: int, width: int) -> NDArray[np.bool_]:
    """bool [H,W]: pixels on the line between cells of different tokens."""
    full = slots.repeat(height, 0).repeat(width, 1)
    below, right = full[1:] != full[:-1], full[:, 1:] != full[:, :-1]
    border = np.zeros(full.shape, bool)
    border[1:] |= below
    border[:, 1:] |= right
    if min(height, width) >= 24:  # large patches: the line is 2 pixels wide, one on either side
        border[:-1] |= below
        border[:, :-1] |= right
    return border


def _distinct_colours(n: int) -> NDArray[np.float64]:
    """[n,3]: bright colours whose hues go round by the golden ratio, so that neighbours in the list differ."""
    hue = np.arange(n)[:, None] * (math.sqrt(5) - 1) / 2 + np.array([0, 1 / 3, 2 / 3])
    return 255 * (0.5 + 0.5 * np.cos(2 * np.pi * hue))


def picture_grid(
    pictures: Sequence[Image.Image], captions: Sequence[str], *, columns: int | None = None
) -> Image.Image:
    """Pictures side by side on white, each with its caption below.

    Args:
        pictures: of any sizes; a column is as wide as the widest of all, a row as high as its highest.
        captions: one line each.
        columns: pictures per row, by default all of them.

    Raises:
        ValueError: no pictures, or another number of captions.
    """
    if not pictures or len(captions) != len(pictures):
        raise ValueError(f"captions must be as many as pictures, at least 1; got {len(captions)} and {len(pictures)}")
    columns = columns or len(pictures)
    if columns < 1:
        raise ValueError(f"columns must be >= 1, got {columns}")
    width = max(picture.width for picture in pictures)
    text = max(14, width // 16)
    gap, line, font = text, text * 9 // 4, ImageFont.load_default(text)
    starts = range(0, len(pictures), columns)
    heights = [max(picture.height for picture in pictures[start : start + columns]) + line for start in starts]
    used = min(columns, len(pictures))
    sheet = Image.new("RGB", (gap + used * (width + gap), gap + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    top = gap
    for start, height in zip(starts, heights, strict=True):
        for column in range(min(columns, len(pictures) - start)):
            picture = pictures[start + column]
            left = gap + column * (width + gap)
            sheet.paste(picture, (left + (width - picture.width) // 2, top + height - line - picture.height))
            middle = (left + width // 2, top + height - line + text)
            draw.text(middle, captions[start + column], fill=_INK, font=font, anchor="mm")
        top += height
    return sheet


def draw_bars(labels: Sequence[str], values: Sequence[float], title: str) -> Image.Image:
    """Horizontal bars from 0, each with its label and its value as ``1.23x``, and a line at 1.

    Raises:
        ValueError: no values, or another number of labels.
    """
    if not values or len(labels) != len(values):
        raise ValueError(f"labels must be as many as values, at least 1; got {len(labels)} and {len(values)}")
    text, step, length = 20, 34, 560
    font = ImageFont.load_default(text)
    left = text + math.ceil(max(font.getlength(label) for label in labels)) + text
    longest = max(*values, 1.0)
    sheet = Image.new("RGB", (left + length + 5 * text, (len(values) + 2) * step), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((text, step * 0.75), title, fill=_INK, font=font, anchor="lm")
    for row, (label, value) in enumerate(zip(labels, values, strict=True)):
        middle = (row + 2) * step
        end = left + round(length * max(value, 0.0) / longest)
        draw.text((left - text // 2, middle), label, fill=_INK, font=font, anchor="rm")
        draw.rectangle((left, middle - step // 3, end, middle + step // 3), fill=_BAR if value >= 1 else _FAINT)
        draw.text((sheet.width - text, middle), f"{value:.2f}x", fill=_INK, font=font, anchor="rm")
    one = left + round(length / longest)
    draw.line((one, step * 1.5, one, sheet.height - step * 0.4), fill=_INK, width=1)
    return sheet


def draw_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    title: str,
    x_label: str,
    *,
    notes: Sequence[tuple[float, float, str]] = (),
    x_text: Callable[[float], str] = "{:g}".format,
) -> Image.Image:
    """Lines with a dot at every point over a logarithmic x axis, and which colour is which.

    Args:
        curves: by name, points ``(x > 0, y)``, drawn from left to right; a single one becomes a level line.
        title: above; says what y is.
        x_label: below.
        notes: ``(x, y, text)`` to be written beside points, moved down where they would cover each other.
        x_text: what to write below an x at which there is a point.

    Raises:
        ValueError: no points, or an x that is not positive.
    """
    points = [point for curve in curves.values() for point in curve]
    if not points or min(x for x, _ in points) <= 0:
        raise ValueError(f"curves must have points, all with x > 0; got {curves}")
    text, width, height = 16, 620, 400
    font = ImageFont.load_default(text)
    xs = sorted({x for x, _ in points})
    low, high = min(y for _, y in points), max(y for _, y in points)
    extent = high - low or max(abs(high), 1.0)
    unit = 10.0 ** math.floor(math.log10(extent))
    unit *= next(part for part in (0.2, 0.5, 1, 2, 5, 10) if extent / (part * unit) <= 8)
    low, high = unit * math.floor(low / unit), unit * (math.floor(high / unit) + 1)
    left, top = 5 * text, 3 * text
    legend = math.ceil(max(font.getlength(name) for name in curves)) + 4 * text
    sheet = Image.new("RGB", (left + width + legend, top + height + 4 * text), "white")
    draw = ImageDraw.Draw(sheet)

    def place(x: float, y: float) -> tuple[int, int]:
        span = math.log(xs[-1] / xs[0]) or 1.0
        right = text + round((width - 2 * text) * math.log(x / xs[0]) / span)
        return left + right, top + round(height * (high - y) / (high - low))

    draw.text((text, text), title, fill=_INK, font=font, anchor="lm")
    draw.text((left + width // 2, sheet.height - text), x_label, fill=_INK, font=font, anchor="mm")
    for step in range(round((high - low) / unit) + 1):
        y = low + step * unit
        row = place(xs[0], y)[1]
        draw.line((left, row, left + width, row), fill=_GRID)
        draw.text((left - text // 2, row), f"{round(y, 6):g}", fill=_INK, font=font, anchor="rm")
    written = -math.inf
    for x in xs:
        column, label = place(x, low)[0], x_text(x)
        if column - font.getlength(label) / 2 > written + text / 2:
            draw.text((column, top + height + text), label, fill=_INK, font=font, anchor="mm")
            written = column + font.getlength(label) / 2
    for row, (name, curve) in enumerate(curves.items()):
        colour = tuple(int(part) for part in 0.75 * _distinct_colours(len(curves))[row])
        corners = [place(x, y) for x, y in sorted(curve)]
        if len(corners) == 1:
            draw.line((left, corners[0][1], left + width, corners[0][1]), fill=colour, width=2)
        draw.line(corners, fill=colour, width=2)
        middle = (left + width + 2 * text, top + (row + 1) * 3 * text // 2)
        for x, y in (*corners, middle):
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
        draw.text((middle[0] + text, middle[1]), name, fill=_INK, font=font, anchor="lm")
    small = ImageFont.load_default(text - 3)
    taken: list[tuple[float, float, float, float]] = []
    for x, y, note in sorted(notes, key=lambda note: -note[1]):
        column, row = place(x, y)
        row -= 9
        box = draw.textbbox((column + 8, row), note, font=small, anchor="lm")
        while any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
            row += 2
            box = draw.textbbox((column + 8, row), note, font=small, anchor="lm")
        taken.append(box)
        draw.text((column + 8, row), note, fill=_INK, font=small, anchor="lm")
    return sheet


def save(picture: Image.Image, path: Path | str) -> None:
    """Write the picture, in a new folder if need be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
