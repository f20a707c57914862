"""LLaVA-NeXT and LLaVA-OneVision: tiles put together, padding cut off, rows ended by a line break.

The arithmetic is `AnyresSizing`'s, so the rows are as many as the gateway counted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from shared.media.sizing.anyres import AnyresSizing
from shared.model.tower_families import TowerFamily
from shared.model.towers.llava import LlavaModule
from shared.model.towers.pixels import Pixels
from shared.model.towers.tiles import TileTower


class AnyresTower(TileTower):
    """The whole picture in the first tile, then the tiles row by row."""

    @staticmethod
    def assemble(config: Any, family: TowerFamily) -> nn.Module:
        return LlavaModule(config, family, has_newline=True)

    def rows(self, picture: Pixels, features: torch.Tensor) -> torch.Tensor:
        """`[side * side + rows * (columns + 1), hidden]`, or the rows of a part of these."""
        if picture.part is None:
            return self._all_rows(picture, features)
        # Put together like the whole, so that each row comes out of the same arithmetic: where
        # tiles are missing there are zeros, and rows that nobody asked for.
        _, tile_rows, tile_columns = picture.grid_thw
        canvas = features.new_zeros(1 + tile_rows * tile_columns, *features.shape[1:])
        canvas[picture.first_tile : picture.first_tile + len(features)] = features
        return self._all_rows(picture, canvas)[picture.part.first_row : picture.part.last_row]

    def _all_rows(self, picture: Pixels, features: torch.Tensor) -> torch.Tensor:
        whole, tiles = features[0], features[1:]
        grid = self._kept(picture, tiles)
        assert isinstance(self.module, LlavaModule)
        newline = self.module.image_newline.expand(grid.shape[0], 1, -1)
        return torch.cat((whole, torch.cat((grid, newline), dim=1).flatten(0, 1)))

    def _kept(self, picture: Pixels, tiles: torch.Tensor) -> torch.Tensor:
        """`[rows, columns, hidden]` of what is no padding, shrunk if the family does so."""
        sizing = self.spec.tiles
        assert isinstance(sizing, AnyresSizing)
        tile_rows, tile_columns = sizing.tiles(*picture.size)
        grid = tiles.reshape(tile_rows, tile_columns, sizing.side, sizing.side, tiles.shape[-1])
        grid = grid.transpose(1, 2).flatten(0, 1).flatten(1, 2)
        kept = sizing.kept(*picture.size)
        grid = grid[kept.skip_rows : grid.shape[0] - kept.skip_rows]
        grid = grid[:, kept.skip_columns : grid.shape[1] - kept.skip_columns]
        if grid.shape[:2] == (kept.rows, kept.columns):
            return grid
        channels_first = grid.permute(2, 0, 1)[None]
        shrunk = functional.interpolate(
            channels_first, size=(kept.rows, kept.columns), mode="bilinear"
        )
        return shrunk[0].permute(1, 2, 0)
