"""The vision tower over a batch of pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shared.model.towers.base import VisionTower
from shared.model.towers.pixels import Pixels


class EncodeExecutor:
    """Embeds pictures packed end to end: no padding, whatever their sizes.

    Embeddings come in `dtype`, the tower's own by default.
    """

    def __init__(self, tower: VisionTower, dtype: torch.dtype | None = None) -> None:
        self._tower = tower
        self._dtype = dtype or tower.dtype

    def run(self, pictures: Sequence[Pixels]) -> list[torch.Tensor]:
        """One contiguous `[num_tokens, embedding_width]` on its own storage per picture."""
        embeddings = self._tower.encode(pictures)
        return [embedding.to(self._dtype, copy=True) for embedding in embeddings]
