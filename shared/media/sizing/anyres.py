"""LLaVA-NeXT and LLaVA-OneVision: the best of some resolutions, padding cut off again.

The picture is scaled into the resolution that keeps most of it and padded there; the resolution is
cut into tiles. Of the tiles' features the padding is dropped, every row ends with a learned line
break, and the whole picture in one tile comes first. OneVision shrinks what is still too much.
Each picture is treated alike, however many a prompt has, so that an embedding depends on its
picture alone. Sources: LLaVA-NeXT (2024-01-30, project page); LLaVA-OneVision (arXiv 2408.03326),
section 3.2.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from shared.media.sizing.base import ImageLayout, refuse_extreme
from shared.media.sizing.division import Part, UnitRun

# The reference shrinks only what exceeds the limit by more than this.
SHRINK_ABOVE = 1.1

# A feature row that lies so near to another may be read by its neighbour: rounding decides.
_NEAR = 1e-3


@dataclass(frozen=True, slots=True)
class Kept:
    """What remains of the tiles' feature grid: rows and columns to skip at either end, and the
    size that the rest is shrunk to."""

    skip_rows: int
    skip_columns: int
    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class AnyresSizing:
    """`resolutions` are heights and widths in pixels; a tile has `side` by `side` features.

    `max_tiles` bounds the features to those of so many tiles; None does not.
    """

    tile_size: int
    side: int
    resolutions: tuple[tuple[int, int], ...]
    max_tiles: int | None = None

    def measure(self, height: int, width: int) -> ImageLayout:
        """One run: the whole picture, then the kept rows with their line breaks."""
        refuse_extreme(height, width)
        rows, columns = self.tiles(height, width)
        kept = self.kept(height, width)
        return ImageLayout(
            grid_thw=(1, rows, columns),
            pieces=(self.side**2 + kept.rows * (kept.columns + 1),),
            num_tiles=1 + rows * columns,
            units=self._units(rows, columns, kept),
        )

    def tiles(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles."""
        best = min(self.resolutions, key=lambda each: _badness(height, width, *each))
        return best[0] // self.tile_size, best[1] // self.tile_size

    def kept(self, height: int, width: int) -> Kept:
        """Padding lies at both ends of one axis, in whole features."""
        tile_rows, tile_columns = self.tiles(height, width)
        rows, columns = tile_rows * self.side, tile_columns * self.side
        skip_rows = skip_columns = 0
        # Rounded before it is cut, as the reference does: 0.1 + 0.2 must not lose a row.
        if width / height > columns / rows:
            skip_rows = (rows - int(round(height * (columns / width), 7))) // 2
        else:
            skip_columns = (columns - int(round(width * (rows / height), 7))) // 2
        rows, columns = rows - 2 * skip_rows, columns - 2 * skip_columns
        return Kept(skip_rows, skip_columns, *self._shrunk(rows, columns))

    def tiles_of(self, part: Part, height: int, width: int) -> tuple[int, int]:
        """First tile and tile behind the last that a part's rows are made of, the whole picture
        being tile 0. Where features are shrunk, neighbours may both need a row of tiles."""
        (tile_rows, tile_columns), kept = self.tiles(height, width), self.kept(height, width)
        first = max(0, part.first_row - self.side**2) // (kept.columns + 1)
        last = (part.last_row - self.side**2) // (kept.columns + 1)
        if last <= first:
            return 0, 1
        top = (kept.skip_rows + self._read_rows(first, tile_rows, kept)[0]) // self.side
        bottom = (kept.skip_rows + self._read_rows(last - 1, tile_rows, kept)[1]) // self.side
        start = 1 + top * tile_columns if part.first_unit else 0
        return start, 1 + (bottom + 1) * tile_columns

    def _units(self, tile_rows: int, tile_columns: int, kept: Kept) -> tuple[UnitRun, ...]:
        """The whole picture, then each row of tiles with the kept rows that begin in it."""
        per_tile = self.side**2
        begin = Counter(
            (kept.skip_rows + self._read_rows(row, tile_rows, kept)[0]) // self.side
            for row in range(kept.rows)
        )
        row_tokens = kept.columns + 1
        return (
            (1, per_tile, per_tile),
            *((1, begin[row] * row_tokens, tile_columns * per_tile) for row in range(tile_rows)),
        )

    def _read_rows(self, row: int, tile_rows: int, kept: Kept) -> tuple[int, int]:
        """First and last feature row, padding cut off, that a kept row is made of: two rows where
        features are shrunk, itself otherwise."""
        num_rows = tile_rows * self.side - 2 * kept.skip_rows
        if num_rows == kept.rows:
            return row, row
        at = max(0.0, (row + 0.5) * num_rows / kept.rows - 0.5)
        return max(0, math.floor(at - _NEAR)), min(num_rows - 1, math.floor(at + _NEAR) + 1)

    def _shrunk(self, rows: int, columns: int) -> tuple[int, int]:
        if self.max_tiles is None:
            return rows, columns
        ratio = math.sqrt(rows * columns / (self.max_tiles * self.side**2))
        if ratio <= SHRINK_ABOVE:
            return rows, columns
        return int(rows // ratio), int(columns // ratio)


def _badness(height: int, width: int, into_height: int, into_width: int) -> tuple[int, int]:
    """Sorts resolutions: the most picture pixels kept, then the fewest pixels wasted."""
    scale = min(into_width / width, into_height / height)
    kept = min(int(width * scale) * int(height * scale), width * height)
    return -kept, into_height * into_width - kept
