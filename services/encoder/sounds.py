"""Sound bytes to a spectrogram, exactly as the model's own feature extractor makes it.

In: the raw bytes of one sound. Out: the spectra that the tower looks at, and how many tokens they
become. The extractor always works on the model's full length: the loudest spectrum of a sound
decides what of its silence is kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from shared.errors import FailureKind, RequestFailed, UnsupportedModel
from shared.media.audio import AudioLimits, read_audio
from shared.media.sizing.sound import STRIDE
from shared.messages.descriptor import MediaPart
from shared.model.towers.spectrogram import Spectrogram
from shared.modelspec import ModelSpec


class SoundPreprocessor:
    """The model folder's feature extractor."""

    def __init__(self, model_dir: Path) -> None:
        from transformers import AutoFeatureExtractor

        spec = ModelSpec.load(model_dir)
        if spec.audio is None:
            raise UnsupportedModel(f"model_type={spec.model_type!r} has no audio tower")
        self._sizing = spec.audio.sizing
        self._extractor: Any = AutoFeatureExtractor.from_pretrained(model_dir)

    def __call__(self, data: bytes, part: MediaPart | None = None) -> Spectrogram:
        """Decode, resample and transform. Raises `RequestFailed` on a bad file."""
        if part is not None:
            raise RequestFailed(FailureKind.INTERNAL, "a sound is heard whole, it has no parts")
        # The gateway has already measured the file; what it decodes to is what counts here.
        limits = AudioLimits(len(data), self._sizing.max_duration_s)
        samples = read_audio(data, self._sizing.rate_hz, limits)
        layout = self._sizing.measure(len(samples))
        features = self._extractor(
            samples,
            sampling_rate=self._sizing.rate_hz,
            padding="max_length",
            return_attention_mask=True,
            return_tensors="np",
        )
        num_frames = int(features["attention_mask"].sum())
        if num_frames != layout.num_frames:
            raise RequestFailed(
                FailureKind.INTERNAL,
                f"the feature extractor made {num_frames} spectra of {len(samples)} samples, "
                f"the model's sizing rule gives {layout.num_frames}",
            )
        seen = features["input_features"][0, :, : STRIDE * layout.num_positions + 1]
        return Spectrogram(torch.from_numpy(seen).contiguous(), layout)
