"""Video bytes to pixels, exactly as transformers' video processor makes them.

In: the raw bytes of one video, and which part of it is wanted, if not all. Out: normalised patches
and their grid. transformers' own processor needs torchvision, whose resizing of bytes on a CPU is
torch's; the same calls are made here. Frames are resized one by one as they are decoded, so a clip
never lies in memory at its own size. A part is some steps of the grid: only their frames are
resized, and those behind them are not decoded.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional

from services.encoder.parts import part_of
from shared.errors import UnsupportedModel
from shared.media.picture import PictureLimits
from shared.media.video import VideoLimits, probe_video, read_frames
from shared.messages.descriptor import MediaPart
from shared.model.config_fields import parse_config, read_bytes
from shared.model.towers.pixels import Pixels
from shared.model.vision.fields import VisionFiles
from shared.model.vision.spec import VisionSpec

# What the families' processor assumes where the folder is silent (CLIP's).
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_RESCALE = 1 / 255


class ClipPreprocessor:
    """Sampling, resizing, normalising and patches of one model's videos."""

    def __init__(self, model_dir: Path, spec: VisionSpec, limits: PictureLimits) -> None:
        if spec.clips is None:
            raise UnsupportedModel("this model reads no videos")
        path = model_dir / "config.json"
        settings = VisionFiles.read(model_dir, parse_config(read_bytes(path), path)).video_processor
        self._spec, self._sizing = spec, spec.clips
        # The gateway has already measured file and duration; memory is what counts here.
        self._max_pixels = limits.max_pixels
        scale = 1 / settings.get("rescale_factor", _RESCALE)
        self._mean = torch.tensor(settings.get("image_mean", _MEAN)) * scale
        self._std = torch.tensor(settings.get("image_std", _STD)) * scale

    def __call__(self, data: bytes, part: MediaPart | None = None) -> Pixels:
        """Raises `RequestFailed` on a bad video."""
        unbounded = VideoLimits(len(data), float("inf"), 2**31, self._max_pixels)
        facts = probe_video(data, unbounded)
        layout = self._sizing.measure(facts)
        steps, rows, columns = layout.grid_thw
        size = (rows * self._spec.patch_size, columns * self._spec.patch_size)
        indices = frame_indices(facts.num_frames, layout.num_frames)
        if part is not None:
            units, per_step = part_of(part, layout.units), self._spec.temporal_patch_size
            indices = indices[units.first_unit * per_step : units.last_unit * per_step]
            steps = units.last_unit - units.first_unit
        frames = torch.stack(
            [
                functional.interpolate(
                    torch.from_numpy(frame).permute(2, 0, 1).contiguous()[None],
                    size=size,
                    mode="bicubic",
                    antialias=True,
                )[0]
                for frame in read_frames(data, indices, self._max_pixels)
            ]
        )
        grid = (steps, rows, columns)
        return Pixels(self._patches(frames, grid), grid, (facts.height, facts.width))

    def _patches(self, frames: torch.Tensor, grid_thw: tuple[int, int, int]) -> torch.Tensor:
        """`[num_frames, channels, height, width]` to `[num_patches, patch_dim]`.

        The last frame is repeated until the last step of the grid is full.
        """
        steps, rows, columns = grid_thw
        unit, merge, side = (
            self._spec.temporal_patch_size,
            self._spec.merge_size,
            self._spec.patch_size,
        )
        values = (frames.float() - self._mean[:, None, None]) / self._std[:, None, None]
        values = torch.cat((values, values[-1:].expand(steps * unit - len(values), -1, -1, -1)))
        grid = values.reshape(
            steps, unit, -1, rows // merge, merge, side, columns // merge, merge, side
        )
        return grid.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(steps * rows * columns, -1)


def frame_indices(num_frames: int, num_sampled: int) -> list[int]:
    """Evenly spread, in the reference's float32 arithmetic: rounding decides between neighbours."""
    indices = torch.arange(0, num_frames, num_frames / num_sampled).int()[:num_sampled]
    return [int(index) for index in indices.clamp(max=num_frames - 1)]
