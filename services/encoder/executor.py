"""The vision tower over a batch of pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shared.model.towers.base import VisionTower
from shared.model.towers.pixels import Pixels


class EncodeExecutor:
    """Embeds pictures packed end to end: no padding, whatever their sizes."""

    def __init__(self, tower: VisionTower) -> None:
        self._tower = tower

    def run(self, pictures: Sequence[Pixels]) -> list[torch.Tensor]:
        """One contiguous `[num_tokens, embedding_width]` on its own storage per picture."""
        return [embedding.clone() for embedding in self._tower.encode(pictures)]
