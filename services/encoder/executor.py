"""The vision tower over a batch of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shared.model.towers import VisionTower


@dataclass(frozen=True, eq=False)
class Pixels:
    """One preprocessed picture: `patches` `[num_patches, patch_dim]` float32, `grid_thw` in
    patches."""

    patches: torch.Tensor
    grid_thw: tuple[int, int, int]

    @property
    def num_patches(self) -> int:
        """Rows of `patches`."""
        return self.patches.shape[0]


class EncodeExecutor:
    """Embeds pictures packed end to end: no padding, whatever their sizes.

    Embeddings come in `dtype`, the tower's own by default.
    """

    def __init__(
        self,
        tower: VisionTower,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        self._tower = tower
        self._device = device
        self._dtype = dtype or tower.dtype

    def run(self, pictures: Sequence[Pixels]) -> list[torch.Tensor]:
        """One contiguous `[num_tokens, hidden]` on its own storage per picture."""
        patches = torch.cat([picture.patches for picture in pictures]).to(self._device)
        grids = torch.tensor([picture.grid_thw for picture in pictures], device=self._device)
        embeddings = self._tower.encode(patches, grids)
        return [embedding.to(self._dtype, copy=True) for embedding in embeddings]
