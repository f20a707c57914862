"""InternVL: a picture is stretched over the canvas of tiles that fits its shape best.

Source: InternVL 1.5 (arXiv 2404.16821), section 3.2, dynamic high resolution.
"""

from __future__ import annotations

from dataclasses import dataclass

from shared.media.sizing.base import ImageLayout, refuse_extreme


@dataclass(frozen=True, slots=True)
class CanvasSizing:
    """`min_tiles` to `max_tiles` square tiles of `tile_size` pixels, `tokens_per_tile` each.

    More than one tile is followed by the whole picture in one more tile.
    """

    tile_size: int
    tokens_per_tile: int
    min_tiles: int
    max_tiles: int
    before: str
    after: str
    patches_per_tile: int = 1

    def measure(self, height: int, width: int) -> ImageLayout:
        """All tiles in one run between the marks."""
        refuse_extreme(height, width)
        rows, columns = self._canvas(height, width)
        num_tiles = rows * columns
        if num_tiles > 1:
            num_tiles += 1
        return ImageLayout(
            grid_thw=(1, rows, columns),
            pieces=(self.before, num_tiles * self.tokens_per_tile, self.after),
            num_tiles=num_tiles,
            units=((num_tiles, self.tokens_per_tile, self.patches_per_tile),),
        )

    def _canvas(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns. Of equally good shapes the last wins that the picture half fills."""
        if self.max_tiles <= 1:
            return 1, 1
        best, best_error = (1, 1), float("inf")
        for rows, columns in self._shapes():
            error = abs(width / height - columns / rows)
            half_canvas = 0.5 * self.tile_size**2 * rows * columns
            if error < best_error or (error == best_error and height * width > half_canvas):
                best, best_error = (rows, columns), error
        return best

    def _shapes(self) -> list[tuple[int, int]]:
        """Small canvases first; of the same area, narrow ones first."""
        sides = range(1, self.max_tiles + 1)
        shapes = [
            (rows, columns)
            for columns in sides
            for rows in sides
            if self.min_tiles <= rows * columns <= self.max_tiles
        ]
        return sorted(shapes, key=lambda shape: shape[0] * shape[1])
