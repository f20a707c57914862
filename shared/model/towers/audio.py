"""Qwen2-Audio: the encoder's layers over what is sound, and a projector.

transformers runs every sound at the tower's full 30 seconds and masks the silence behind it. Its
convolutions reach one spectrum to each side and its attention sees no masked position, so the rows
of a sound follow from its own positions and one spectrum of the silence. Only these are computed
here, which is as many times less work as the sound is shorter. Each sound is computed alone: its
rows are the same to the last bit, whatever is encoded with it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from shared.media.sizing.sound import STRIDE
from shared.model.audio_spec import AudioSpec
from shared.model.tower_families import TowerFamily
from shared.model.towers.base import Tower
from shared.model.towers.spectrogram import Spectrogram


class AudioModule(nn.Module):
    """Tower and projector of transformers; the positions that count are chosen here."""

    def __init__(self, config: Any, family: TowerFamily) -> None:
        from transformers import AutoModel

        super().__init__()
        projector: Any = getattr(importlib.import_module(family.module), family.class_name)
        self.audio_tower: Any = AutoModel.from_config(config.audio_config)
        self.projector = projector(config)

    def forward(self, spectra: torch.Tensor, num_positions: int) -> torch.Tensor:
        """`[1, num_mel_bins, num_frames]` to `[num_tokens, hidden]`."""
        tower, num_frames = self.audio_tower, STRIDE * num_positions
        # The last spectrum is only looked at from the left; its own column is not a sound's.
        hidden = functional.gelu(tower.conv1(spectra))[..., :num_frames]
        hidden = functional.gelu(tower.conv2(hidden)).transpose(1, 2)
        hidden = hidden + tower.embed_positions.weight[:num_positions]
        for layer in tower.layers:
            hidden = layer(hidden, None)
        pooled = tower.avg_pooler(hidden.transpose(1, 2)).transpose(1, 2)
        projected: torch.Tensor = self.projector(tower.layer_norm(pooled))
        return projected[0]


class AudioTower(Tower):
    """Sounds one by one."""

    spec: AudioSpec

    @staticmethod
    def assemble(config: Any, family: TowerFamily) -> nn.Module:
        return AudioModule(config, family)

    @torch.inference_mode()
    def encode(self, sounds: Sequence[Spectrogram]) -> list[torch.Tensor]:
        """Rows of each sound's tokens."""
        return [self._rows(sound) for sound in sounds]

    def _rows(self, sound: Spectrogram) -> torch.Tensor:
        num_positions, max_positions = sound.layout.num_positions, self.spec.max_positions
        # One spectrum of silence behind the sound is seen, except where the tower ends.
        num_seen = min(STRIDE * num_positions + 1, STRIDE * max_positions)
        expected = (self.spec.num_mel_bins, num_seen)
        if num_positions > max_positions or sound.values.shape != expected:
            raise ValueError(
                f"spectrogram {list(sound.values.shape)} for {num_positions} of "
                f"{max_positions} positions, which need {list(expected)}"
            )
        values = sound.values[None].to(self.device, self.dtype)
        rows: torch.Tensor = self.module(values, num_positions)
        return rows
