"""Bytes to what a tower takes, exactly as the model's own processors make it.

In: the raw bytes of one picture or video, told apart by their first bytes, or of one sound, and
which part of it is wanted, if not all. Out: normalised patches or tiles and their grid, or a
spectrogram. Runs in the encoder's preprocessing threads, never on the event loop and never on the
compute thread.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from services.encoder.clips import ClipPreprocessor
from services.encoder.job import Preprocess
from services.encoder.parts import cut_tiles
from services.encoder.sounds import SoundPreprocessor
from shared.errors import FailureKind, RequestFailed, UnsupportedModel
from shared.media.picture import PictureLimits, open_picture
from shared.media.sizing.base import ImageLayout
from shared.media.video import container_of
from shared.messages.descriptor import MediaPart
from shared.model.towers.pixels import Pixels
from shared.model.vision.spec import VisionSpec
from shared.modelspec import ModelSpec

# What the families' processors tell their image processors, whatever the folder says.
_OPTIONS: dict[str, dict[str, bool]] = {
    "internvl": {"crop_to_patches": True},
    "gemma3": {"do_pan_and_scan": False},
}


def open_preprocessor(model_dir: Path, limits: PictureLimits) -> Preprocess:
    """What prepares this model's media; `UnsupportedModel` for a model that reads text only."""
    audio = ModelSpec.load(model_dir).audio
    return PicturePreprocessor(model_dir, limits) if audio is None else SoundPreprocessor(model_dir)


class PicturePreprocessor:
    """The model folder's image processor (Pillow backend; torchvision is not needed)."""

    def __init__(self, model_dir: Path, limits: PictureLimits) -> None:
        from transformers import AutoImageProcessor

        spec = ModelSpec.load(model_dir)
        if spec.vision is None:
            raise UnsupportedModel(f"model_type={spec.model_type!r} has no vision tower")
        self._spec: VisionSpec = spec.vision
        self._options = _OPTIONS.get(spec.model_type, {})
        self._processor: Any = AutoImageProcessor.from_pretrained(model_dir, backend="pil")
        self._limits = limits
        self._clips = ClipPreprocessor(model_dir, self._spec, limits) if self._spec.clips else None

    def __call__(self, data: bytes, part: MediaPart | None = None) -> Pixels:
        """Decode, resize, normalise and cut. Raises `RequestFailed` on a bad file."""
        if self._clips is not None and container_of(data) is not None:
            return self._clips(data, part)
        picture = open_picture(data, self._limits)
        layout = self._spec.sizing.measure(picture.height, picture.width)
        features = self._processor(images=[picture], return_tensors="np", **self._options)
        size = (picture.height, picture.width)
        if self._spec.tiles is not None:
            pixels = self._tiles(features["pixel_values"], layout, size)
            return pixels if part is None else cut_tiles(pixels, part, self._spec.tiles)
        if part is not None:
            raise RequestFailed(
                FailureKind.INTERNAL, "a picture that is seen whole cannot be divided"
            )
        t, h, w = (int(n) for n in features["image_grid_thw"][0])
        if (t, h, w) != layout.grid_thw:
            raise _disagree(size, f"a grid of {(t, h, w)}", f"{layout.grid_thw}")
        return Pixels(torch.from_numpy(features["pixel_values"]), (t, h, w), size)

    def _tiles(self, values: Any, layout: ImageLayout, size: tuple[int, int]) -> Pixels:
        # Some processors give one list for each picture, some one for all.
        tiles = np.asarray(values, dtype=np.float32)
        tiles = tiles.reshape(-1, *tiles.shape[-3:])
        if len(tiles) != layout.num_tiles:
            raise _disagree(size, f"{len(tiles)} tiles", f"{layout.num_tiles}")
        patches = (tiles.shape[-2] // self._spec.patch_size) * (
            tiles.shape[-1] // self._spec.patch_size
        )
        return Pixels(torch.from_numpy(tiles), layout.grid_thw, size, patches_per_value=patches)


def _disagree(size: tuple[int, int], made: str, counted: str) -> RequestFailed:
    return RequestFailed(
        FailureKind.INTERNAL,
        f"the image processor made {made} of a picture of {size[1]}x{size[0]} pixels, "
        f"the model's sizing rule gives {counted}",
    )
