"""One picture, or one part of it, as a tower takes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shared.media.sizing.division import Part


@dataclass(frozen=True, eq=False)
class Pixels:
    """One preprocessed picture or part of one.

    `values`, float32: flattened patches `[num_patches, patch_dim]` for towers that take pictures at
    their own size, tiles `[num_tiles, channels, height, width]` for the others. `grid_thw` as in
    `ImageLayout`; `size` is the picture's height and width before preprocessing, which some towers
    need to know what of a tile is padding.

    Of a divided picture only the values are there that `part` needs, from tile `first_tile` on;
    grid and size are the whole picture's. A part of a video is a shorter video.
    """

    values: torch.Tensor
    grid_thw: tuple[int, int, int]
    size: tuple[int, int] = (0, 0)
    patches_per_value: int = 1
    part: Part | None = None
    first_tile: int = 0

    @property
    def num_patches(self) -> int:
        """What the tower's work is measured in."""
        return self.values.shape[0] * self.patches_per_value
