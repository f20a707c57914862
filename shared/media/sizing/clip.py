"""Qwen-VL: which frames of a clip are looked at, and what they become in the prompt.

Must agree with transformers' video processor for every clip: prefill and encoder count on it.
Frames are taken evenly, so many a second; they keep their shape like pictures, and each
`temporal_patch_size` of them are one step of the grid. Source: Qwen2.5-VL (arXiv 2502.13923),
section 2.1.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shared.media.sizing.division import UnitRun
from shared.media.sizing.grid import GridSizing
from shared.media.video import VideoFacts

# What Qwen's own preprocessing takes. transformers' processor takes every frame unless told.
DEFAULT_FPS = 2.0

# The share of `max_video_tokens` that a clip may fill, and how far above the smallest size a
# frame may always be, if each frame's pixels are capped.
_VIDEO_SHARE = 0.9
_ABOVE_LEAST = 1.05


@dataclass(frozen=True, slots=True)
class ClipLayout:
    """A clip as the tower sees it: `num_frames` sampled ones, in a grid of patches.

    `seconds_per_step` is the time between two steps of the grid.
    """

    grid_thw: tuple[int, int, int]
    num_frames: int
    num_tokens: int
    seconds_per_step: float

    @property
    def units(self) -> tuple[UnitRun, ...]:
        """Steps of the grid: the tower attends within each."""
        steps, rows, columns = self.grid_thw
        return ((steps, self.num_tokens // steps, rows * columns),)


@dataclass(frozen=True, slots=True)
class ClipSizing:
    """The video processor's settings. `num_frames` wins over `fps`."""

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    min_pixels: int
    max_pixels: int
    fps: float = DEFAULT_FPS
    num_frames: int | None = None
    min_frames: int = 4
    max_frames: int = 768
    cap_pixels_per_frame: bool = False
    max_video_tokens: int = 128_000

    @property
    def policy(self) -> str:
        """Names everything that decides what becomes of a clip."""
        return repr(self)

    def measure(self, facts: VideoFacts) -> ClipLayout:
        """Raises `RequestFailed` (bad request) for frames that are too narrow for the model."""
        num_frames = self.num_sampled(facts)
        layout = self._frame_sizing(num_frames).measure(facts.height, facts.width)
        _, rows, columns = layout.grid_thw
        steps = -(-num_frames // self.temporal_patch_size)
        # In the reference's order of operations, for the sake of the last bit.
        sampled_fps = num_frames / facts.num_frames * facts.fps
        return ClipLayout(
            grid_thw=(steps, rows, columns),
            num_frames=num_frames,
            num_tokens=steps * layout.num_tokens,
            seconds_per_step=self.temporal_patch_size / sampled_fps,
        )

    def num_sampled(self, facts: VideoFacts) -> int:
        """Whole steps; a clip that is shorter than one gives all that it has."""
        unit, total = self.temporal_patch_size, facts.num_frames
        if self.num_frames is not None:
            wanted = float(round(self.num_frames / unit) * unit)
        else:
            wanted = max(total / facts.fps * self.fps, self.min_frames)
        most = min(self.max_frames, total) // unit * unit
        return math.floor(min(wanted, most) / unit) * unit or min(total, unit)

    def _frame_sizing(self, num_frames: int) -> GridSizing:
        max_pixels = self.max_pixels
        if self.cap_pixels_per_frame:
            unit = self.patch_size * self.merge_size
            all_pixels = int(self.max_video_tokens * unit * unit * _VIDEO_SHARE)
            share = all_pixels * self.temporal_patch_size // num_frames
            max_pixels = max(min(max_pixels, share), int(self.min_pixels * _ABOVE_LEAST))
        return GridSizing(self.patch_size, self.merge_size, self.min_pixels, max_pixels)
