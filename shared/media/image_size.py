"""How many placeholder tokens a picture takes: pure arithmetic of the Qwen-VL families.

In: a picture's height and width and the model's patch settings. Out: the size it will be resized
to, its patch grid and its number of tokens. Must agree with the model's image processor for every
size: prefill and encoder count on it. Source: Qwen2-VL (arXiv 2409.12191), section 2.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shared.errors import FailureKind, RequestFailed
from shared.modelspec import VisionSpec

# What the families' image processor assumes where preprocessor_config.json is silent.
DEFAULT_MIN_PIXELS = 56 * 56
DEFAULT_MAX_PIXELS = 28 * 28 * 1280
MAX_ASPECT_RATIO = 200


@dataclass(frozen=True, slots=True)
class ImageSize:
    """A picture as the vision tower sees it; `grid_thw` counts patches before merging."""

    height: int
    width: int
    grid_thw: tuple[int, int, int]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class ImageSizer:
    """Sides become multiples of `patch_size * merge_size`, the area stays within the limits."""

    patch_size: int
    merge_size: int
    min_pixels: int = DEFAULT_MIN_PIXELS
    max_pixels: int = DEFAULT_MAX_PIXELS

    @classmethod
    def of(cls, vision: VisionSpec) -> ImageSizer:
        """The sizer of a model."""
        return cls(
            patch_size=vision.patch_size,
            merge_size=vision.merge_size,
            min_pixels=vision.min_pixels or DEFAULT_MIN_PIXELS,
            max_pixels=vision.max_pixels or DEFAULT_MAX_PIXELS,
        )

    def measure(self, height: int, width: int) -> ImageSize:
        """Raises `RequestFailed` (bad request) for a picture that is too narrow for the model."""
        _refuse_extreme(height, width)
        resized_height, resized_width = self._resized(height, width)
        grid_h, grid_w = resized_height // self.patch_size, resized_width // self.patch_size
        return ImageSize(
            height=resized_height,
            width=resized_width,
            grid_thw=(1, grid_h, grid_w),
            num_tokens=(grid_h // self.merge_size) * (grid_w // self.merge_size),
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


def _refuse_extreme(height: int, width: int) -> None:
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        raise RequestFailed(
            FailureKind.BAD_REQUEST,
            f"a picture of {width}x{height} pixels has an aspect ratio of {ratio:.0f}, "
            f"the limit is {MAX_ASPECT_RATIO}",
        )
