"""One sound as a tower takes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shared.media.sizing.sound import SoundLayout


@dataclass(frozen=True, eq=False)
class Spectrogram:
    """One preprocessed sound.

    `values`, float32: `[num_mel_bins, num_seen]`: the spectra that the positions of `layout` are
    made from, and one of the silence behind them where the extractor gives one.
    """

    values: torch.Tensor
    layout: SoundLayout

    @property
    def grid_thw(self) -> tuple[int, int, int]:
        return self.layout.grid_thw

    @property
    def num_patches(self) -> int:
        """What the tower's work is measured in: positions behind the convolutions."""
        return self.layout.num_positions
