"""Towers that take pictures of one size: all tiles of all pictures in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shared.model.towers.base import VisionTower
from shared.model.towers.pixels import Pixels


class TileTower(VisionTower):
    """`module` maps tiles `[n, channels, height, width]` to rows `[n, tokens_per_tile, hidden]`."""

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Pixels]) -> list[torch.Tensor]:
        """Tile after tile, as they stand in the prompt."""
        features: torch.Tensor = self.module(self.pack(pictures))
        per_picture = torch.split(features, [each.values.shape[0] for each in pictures])
        return [self.rows(each, tiles) for each, tiles in zip(pictures, per_picture, strict=True)]

    def rows(self, picture: Pixels, features: torch.Tensor) -> torch.Tensor:
        """One picture's rows from its tiles' features `[num_tiles, tokens_per_tile, hidden]`."""
        return features.flatten(0, 1)
