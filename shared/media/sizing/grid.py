"""Qwen-VL: a picture keeps its shape, its sides become whole numbers of merged patches.

Must agree with the model's image processor for every size: prefill and encoder count on it.
Source: Qwen2-VL (arXiv 2409.12191), section 2.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shared.media.sizing.base import ImageLayout, refuse_extreme

# What the families' image processor assumes where preprocessor_config.json is silent.
DEFAULT_MIN_PIXELS = 56 * 56
DEFAULT_MAX_PIXELS = 28 * 28 * 1280


@dataclass(frozen=True, slots=True)
class GridSizing:
    """Sides become multiples of `patch_size * merge_size`, the area stays within the limits."""

    patch_size: int
    merge_size: int
    min_pixels: int = DEFAULT_MIN_PIXELS
    max_pixels: int = DEFAULT_MAX_PIXELS

    def measure(self, height: int, width: int) -> ImageLayout:
        """One run of placeholders, one for each merged patch."""
        refuse_extreme(height, width)
        resized_height, resized_width = self._resized(height, width)
        grid_h, grid_w = resized_height // self.patch_size, resized_width // self.patch_size
        num_tokens = (grid_h // self.merge_size) * (grid_w // self.merge_size)
        return ImageLayout(
            grid_thw=(1, grid_h, grid_w),
            pieces=(num_tokens,),
            # One: every patch of a picture attends to all others.
            units=((1, num_tokens, grid_h * grid_w),),
        )

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        unit = self.patch_size * self.merge_size
        # round() rounds halves to even, as the reference does; floor(x + 0.5) would differ.
        sides = (round(height / unit) * unit, round(width / unit) * unit)
        if sides[0] * sides[1] > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            return (
                max(unit, math.floor(height / shrink / unit) * unit),
                max(unit, math.floor(width / shrink / unit) * unit),
            )
        if sides[0] * sides[1] < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            return (
                math.ceil(height * grow / unit) * unit,
                math.ceil(width * grow / unit) * unit,
            )
        return sides
