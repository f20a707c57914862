"""Pictures to arrays: pixels as the image processor makes them, and where marks lie."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from examples.plates.architecture import MAX_PIXELS, MERGE, MIN_PIXELS, PATCH_PX, TOKEN_PX
from examples.plates.draw import Mark, draw, marks
from examples.plates.palette import COLOUR_NAMES
from examples.plates.specs import SHAPES, PlateSpec, Spec

IntArray = NDArray[np.int64]
ByteArray = NDArray[np.uint8]
HINTS = (
    *("glyph", "colour", "centre", "place"),
    *("equal", "alike", "total"),
    *("background", "plate", "ink"),
    "rest",
)
"""What training says about a patch, 0 for nothing: digit or shape, its colour, whether it is the
middle, place in the number; for shapes how many of shape and colour, of the shape, in all;
everywhere the picture's colours; for digits, like their place, the place counted from the end."""
GLYPHS: tuple[str, ...] = (*"0123456789", *SHAPES)


@dataclass(frozen=True)
class PictureCode:
    """One picture in patches, in the order of the image processor (merge blocks of 2 x 2)."""

    grid: tuple[int, int]
    patches: ByteArray  # [patches, 3 * PATCH_PX * PATCH_PX], before normalisation, one frame
    hints: IntArray  # [patches, 11]: see `HINTS`
    marks: IntArray  # [digits or shapes]: the merged token that holds the middle of each


def resized(picture: Image.Image) -> Image.Image:
    """The picture at the size that the image processor chooses for it."""
    height, width = smart_resize(picture.height, picture.width, TOKEN_PX, MIN_PIXELS, MAX_PIXELS)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


@lru_cache(maxsize=512)
def _block_order(rows: int, columns: int) -> IntArray:
    """Raster index of each patch in merge-block order, for a grid of patches."""
    raster = np.arange(rows * columns, dtype=np.int64)
    blocks = raster.reshape(rows // MERGE, MERGE, columns // MERGE, MERGE)
    return blocks.transpose(0, 2, 1, 3).reshape(-1)


def _colours(spec: Spec) -> tuple[int, int, int]:
    """Background, plate and ink as numbers from 1; 0 where there is none."""
    names: tuple[str | None, ...] = (spec.background, None, None)
    if isinstance(spec, PlateSpec):
        names = (spec.background, spec.plate_colour, spec.ink)
    background, plate, ink = (0 if name is None else 1 + COLOUR_NAMES.index(name) for name in names)
    return background, plate, ink


def _cell(mark: Mark, rows: int, columns: int) -> tuple[int, int]:
    """Row and column of the cell that holds the middle of a mark."""
    x, y = mark.centre
    return min(rows - 1, max(0, int(y * rows))), min(columns - 1, max(0, int(x * columns)))


def _hints(spec: Spec, rows: int, columns: int) -> IntArray:
    found = marks(spec)
    table = np.zeros((rows, columns, len(HINTS)), dtype=np.int64)
    table[:, :, 7:10] = _colours(spec)
    equal = Counter((mark.label, mark.colour) for mark in found)
    alike = Counter(mark.label for mark in found)
    for mark in found:
        left, right = _span(mark.centre[0], mark.half_size[0], columns)
        top, bottom = _span(mark.centre[1], mark.half_size[1], rows)
        table[top:bottom, left:right, 0] = 1 + GLYPHS.index(mark.label)
        table[top:bottom, left:right, 1] = 1 + COLOUR_NAMES.index(mark.colour)
        if mark.label in SHAPES:
            counts = equal[mark.label, mark.colour], alike[mark.label], len(found)
            table[top:bottom, left:right, 4:7] = counts
    for mark in found:
        row, column = _cell(mark, rows, columns)
        glyph = 1 + GLYPHS.index(mark.label)
        table[row, column, :4] = (glyph, 1 + COLOUR_NAMES.index(mark.colour), 1, mark.order)
        if mark.label not in SHAPES:
            table[row, column, 10] = 1 + len(found) - mark.order
    return table.reshape(-1, len(HINTS))


def _span(centre: float, half: float, cells: int) -> tuple[int, int]:
    """The cells whose middle lies within `half` of `centre` (both in fractions of the side)."""
    first = int(np.ceil((centre - half) * cells - 0.5))
    last = int(np.floor((centre + half) * cells - 0.5))
    return max(0, first), min(cells, last + 1)


def encode_picture(spec: Spec) -> PictureCode:
    """Draws, resizes and cuts one picture."""
    picture = resized(draw(spec))
    pixels = np.asarray(picture, dtype=np.uint8)
    rows, columns = picture.height // PATCH_PX, picture.width // PATCH_PX
    patches = pixels.reshape(rows, PATCH_PX, columns, PATCH_PX, 3).transpose(0, 2, 4, 1, 3)
    order = _block_order(rows, columns)
    height, width = rows // MERGE, columns // MERGE
    cells = [_cell(mark, height, width) for mark in marks(spec)]
    return PictureCode(
        (rows, columns),
        patches.reshape(rows * columns, -1)[order],
        _hints(spec, rows, columns)[order],
        np.array([row * width + column for row, column in cells], dtype=np.int64),
    )


def picture_positions(rows: int, columns: int) -> IntArray:
    """M-RoPE positions of one picture's tokens, counted from its first. [3, tokens]."""
    height, width = rows // MERGE, columns // MERGE
    y, x = np.divmod(np.arange(height * width, dtype=np.int64), width)
    return np.stack([np.zeros_like(y), y, x])
