"""The tower over a batch of media."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shared.model.towers.base import Tower, TowerInput
from shared.transport.tensors import settled


class EncodeExecutor:
    """Embeds media together without padding, whatever their sizes.

    Embeddings come in `dtype`, the tower's own by default.
    """

    def __init__(self, tower: Tower, dtype: torch.dtype | None = None) -> None:
        self._tower = tower
        self._dtype = dtype or tower.dtype

    def run(self, media: Sequence[TowerInput]) -> list[torch.Tensor]:
        """One contiguous `[num_tokens, embedding_width]` on its own storage per medium, computed to
        the end: others may read it at once."""
        embeddings = self._tower.encode(media)
        return [settled(embedding.to(self._dtype, copy=True)) for embedding in embeddings]
