"""Picture bytes to patches, exactly as the model's own image processor makes them.

In: the raw bytes of one picture. Out: normalised patches and their grid. Runs in the encoder's
preprocessing threads, never on the event loop and never on the compute thread.
"""

from __future__ import annotations

from pathlib import Path

import torch

from services.encoder.executor import Pixels
from shared.media.picture import PictureLimits, open_picture


class PicturePreprocessor:
    """The model folder's image processor (Pillow backend; torchvision is not needed)."""

    def __init__(self, model_dir: Path, limits: PictureLimits) -> None:
        from transformers import AutoImageProcessor

        self._processor = AutoImageProcessor.from_pretrained(model_dir, backend="pil")
        self._limits = limits

    def __call__(self, data: bytes) -> Pixels:
        """Decode, resize, normalise and cut into patches. Raises `RequestFailed` on a bad
        picture."""
        picture = open_picture(data, self._limits)
        features = self._processor(images=[picture], return_tensors="np")
        t, h, w = (int(n) for n in features["image_grid_thw"][0])
        return Pixels(torch.from_numpy(features["pixel_values"]), (t, h, w))
