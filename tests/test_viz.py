"""Pictures of token maps, pixel by pixel."""

from pathlib import Path

import numpy as np
import pytest
import torch
from fastok import SoftMap, TokenMap

Image = pytest.importorskip("PIL.Image")
viz = pytest.importorskip("fastok.viz")

CELL = 10
SIDE = 3 * CELL  # of grids that are 3 wide


def image_of(colours: list[list[tuple[int, int, int]]], cell: int = 2) -> Image.Image:
    return Image.fromarray(np.array(colours, np.uint8).repeat(cell, 0).repeat(cell, 1))


def map_of(*assign: int) -> TokenMap:
    return TokenMap.from_assign(torch.tensor([assign]), max(assign) + 1)


def centre(picture: Image.Image, row: int, column: int) -> tuple[int, ...]:
    return picture.getpixel((column * CELL + CELL // 2, row * CELL + CELL // 2))


A, B, C, D, E, F = (200, 0, 0), (100, 40, 0), (0, 90, 10), (0, 0, 200), (0, 31, 255), (8, 8, 8)
GRID = [[A, B, C], [D, E, F]]


def test_each_token_is_the_mean_of_its_patches_and_dropped_ones_are_dark() -> None:
    picture = viz.draw_tokens(image_of(GRID), map_of(0, 1, 1, 0, 2, 0, -1), (2, 3), prefix=1, side=SIDE)
    assert picture.size == (30, 20)
    assert picture.mode == "RGB"
    assert centre(picture, 0, 0) == centre(picture, 0, 1) == (150, 20, 0)
    # Slot 0 also holds the class token, which has no pixels.
    assert centre(picture, 0, 2) == centre(picture, 1, 1) == (0, 60, 132)
    assert centre(picture, 1, 0) == D
    assert centre(picture, 1, 2) == (2, 2, 2)


def test_borders_run_between_different_tokens_only() -> None:
    drawn = np.asarray(viz.draw_tokens(image_of(GRID), map_of(1, 1, 2, 2, 2, 2), (2, 3), side=SIDE))
    white = (drawn == viz._BORDER).all(-1)
    expected = np.zeros((20, 30), bool)
    expected[:10, 20] = True  # B | C
    expected[10, :20] = True  # A, B over D, E
    assert (white == expected).all()


def test_large_patches_get_borders_of_two_pixels() -> None:
    drawn = np.asarray(viz.draw_tokens(image_of(GRID), map_of(0, 0, 0, 1, 1, 1), (2, 3), side=90))
    assert (drawn == viz._BORDER).all(-1).sum(0).tolist() == [2] * 90


def test_outline_keeps_the_pixels_and_colour_tints_merged_tokens() -> None:
    token_map = map_of(0, 0, 1, 2, -1, -1)
    outline = viz.draw_tokens(image_of(GRID), token_map, (2, 3), style="outline", side=SIDE)
    assert [centre(outline, 0, column) for column in range(3)] == GRID[0]
    assert centre(outline, 1, 2) == (2, 2, 2)
    colour = viz.draw_tokens(image_of(GRID), token_map, (2, 3), style="color", side=SIDE)
    assert centre(colour, 0, 0) != A
    assert [centre(colour, 0, 2), centre(colour, 1, 0), centre(colour, 1, 2)] == [C, D, (2, 2, 2)]


def test_sample_picks_from_the_batch() -> None:
    token_map = TokenMap.from_assign(torch.tensor([[0, 1], [0, 0]]), 2)
    image = image_of([[(0, 0, 0), (200, 100, 50)]])
    first, second = (viz.draw_tokens(image, token_map, (1, 2), sample=i, side=2 * CELL) for i in range(2))
    assert centre(first, 0, 1) == (200, 100, 50)
    assert centre(second, 0, 0) == centre(second, 0, 1) == (100, 50, 25)


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (37, 111), (640, 427)])
@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_any_image_fits_any_grid(size: tuple[int, int], mode: str) -> None:
    picture = viz.draw_tokens(Image.new(mode, size), TokenMap.identity(1, 15), (3, 5), side=50)
    assert picture.width % 5 == picture.height % 3 == 0
    assert min(picture.width / 5, picture.height / 3) >= 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": (2, 4)}, "token_map has N=6 input tokens, but prefix=0 and grid=2x4 make 8"),
        ({"prefix": 1}, "token_map has N=6 input tokens, but prefix=1"),
        ({"grid": (0, 3)}, "grid"),
        ({"grid": (1, 2, 3)}, r"grid must be \(rows, columns\), both >= 1, got \(1, 2, 3\)"),
        ({"prefix": -1}, "prefix"),
        ({"sample": 1}, "sample"),
        ({"sample": -1}, "sample"),
        ({"style": "cubist"}, "style must be one of mean, outline, color; got 'cubist'"),
        ({"side": 0}, "side"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        viz.draw_tokens(image_of(GRID), **{"token_map": TokenMap.identity(1, 6), "grid": (2, 3)} | changes)


@pytest.mark.parametrize("kind", [Path, str])
def test_pictures_are_saved_in_new_folders(kind: type, tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "picture.png"
    viz.save(image_of(GRID), kind(path))
    assert Image.open(path).getpixel((0, 0)) == A


def test_soft_maps_have_no_patches() -> None:
    with pytest.raises(TypeError, match="SoftMap"):
        viz.draw_tokens(image_of(GRID), SoftMap.from_dense(torch.ones(1, 2, 6)), (2, 3))


def test_picture_grid_places_every_picture_and_writes_captions() -> None:
    red, green, blue = (Image.new("RGB", (160, 40 * i), colour) for i, colour in enumerate(("red", "lime", "blue"), 1))
    sheet = viz.picture_grid([red, green, blue], ["one", "two", "three"], columns=2)
    pixels = np.asarray(sheet)
    for picture in (red, green, blue):
        assert (pixels == picture.getpixel((0, 0))).all(-1).sum() == picture.width * picture.height
    assert (pixels == viz._INK).all(-1).any()
    with pytest.raises(ValueError, match="captions"):
        viz.picture_grid([red], [])
    with pytest.raises(ValueError, match="columns"):
        viz.picture_grid([red], ["one"], columns=-1)


def test_bars_are_as_long_as_their_values() -> None:
    pixels = np.asarray(viz.draw_bars(["fast", "slow"], [2.0, 0.5], "title"))
    fast, slow = ((pixels == colour).all(-1).any(0).sum() for colour in (viz._BAR, viz._FAINT))
    assert fast == pytest.approx(4 * slow, abs=6)
    with pytest.raises(ValueError, match="labels"):
        viz.draw_bars(["fast"], [], "title")


def test_curves_rise_with_their_values() -> None:
    curves = {"one": [(1.0, 10.0), (2.0, 20.0), (16.0, 90.0)]}
    colour = tuple(int(part) for part in 0.75 * viz._distinct_colours(1)[0])
    where = (np.asarray(viz.draw_curves(curves, "title", "x")) == colour).all(-1)[:, :700]  # left of the legend
    heights = [np.flatnonzero(column).mean() for column in where.T if column.any()]
    assert heights[0] > heights[len(heights) // 2] > heights[-1]
    crowded = [(2.0, 20.0, "a note"), (2.0, 20.0, "a note")]
    drawn = [np.asarray(viz.draw_curves(curves, "title", "x", notes=notes)) for notes in (crowded[:1], crowded)]
    dark = [(pixels == viz._INK).all(-1).sum() for pixels in drawn]
    assert dark[1] > dark[0]  # the second is beside the first, not over it
    with pytest.raises(ValueError, match="x > 0"):
        viz.draw_curves({"one": [(0.0, 1.0)]}, "title", "x")
    with pytest.raises(ValueError, match="points"):
        viz.draw_curves({}, "title", "x")
