"""Idefics3 and SmolVLM: a picture is scaled to a longest side and cut into square tiles.

Sources: Idefics3 (arXiv 2408.12637), section 3.2; SmolVLM (arXiv 2504.05299), section 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shared.media.sizing.base import ImageLayout, Piece, refuse_extreme
from shared.media.sizing.division import UnitRun

# Whatever the settings say, no picture is scaled beyond this.
MAX_SIDE = 4096


@dataclass(frozen=True, slots=True)
class SplitSizing:
    """Tiles of `tile_size` pixels row by row, then the whole picture in one tile.

    `longest_edge` is what the longer side is scaled to first; `splits` is False for models that
    only look at the whole picture.
    """

    tile_size: int
    tokens_per_tile: int
    longest_edge: int
    splits: bool
    around: str = "<fake_token_around_image>"
    whole: str = "<global-img>"
    patches_per_tile: int = 1

    def measure(self, height: int, width: int) -> ImageLayout:
        """A run for each tile, with its coordinates in front, then one for the whole picture."""
        refuse_extreme(height, width)
        rows, columns = self._tiles(height, width) if self.splits else (1, 1)
        if rows * columns == 1:
            pieces = (f"{self.around}{self.whole}", self.tokens_per_tile, self.around)
            return ImageLayout(grid_thw=(1, 0, 0), pieces=pieces, units=self._units(1))
        return ImageLayout(
            grid_thw=(1, rows, columns),
            pieces=tuple(self._pieces(rows, columns)),
            num_tiles=rows * columns + 1,
            units=self._units(rows * columns + 1),
        )

    def _units(self, num_tiles: int) -> tuple[UnitRun, ...]:
        return ((num_tiles, self.tokens_per_tile, self.patches_per_tile),)

    def _pieces(self, rows: int, columns: int) -> list[Piece]:
        pieces: list[Piece] = []
        line_break = ""
        for row in range(1, rows + 1):
            for column in range(1, columns + 1):
                pieces.append(f"{line_break}{self.around}<row_{row}_col_{column}>")
                pieces.append(self.tokens_per_tile)
                line_break = ""
            line_break = "\n"
        pieces += [f"\n\n{self.around}{self.whole}", self.tokens_per_tile, self.around]
        return pieces

    def _tiles(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns after both sides were stretched to whole tiles."""
        height, width = _at_most(*_scaled(height, width, self.longest_edge), MAX_SIDE)
        ratio = width / height
        if width >= height:
            columns = math.ceil(width / self.tile_size)
            return math.ceil(int(columns * self.tile_size / ratio) / self.tile_size), columns
        rows = math.ceil(height / self.tile_size)
        return rows, math.ceil(int(rows * self.tile_size * ratio) / self.tile_size)


def _scaled(height: int, width: int, longest: int) -> tuple[int, int]:
    """The longer side becomes `longest`, the other follows and is made even."""
    ratio = width / height
    if width >= height:
        other = int(longest / ratio)
        return max(other + other % 2, 1), longest
    other = int(longest * ratio)
    return longest, max(other + other % 2, 1)


def _at_most(height: int, width: int, longest: int) -> tuple[int, int]:
    ratio = width / height
    if max(height, width) <= longest:
        return height, width
    if width >= height:
        return max(int(longest / ratio), 1), longest
    return longest, max(int(longest * ratio), 1)
