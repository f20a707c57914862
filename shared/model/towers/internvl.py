"""InternVL: neighbouring patches' features are joined into one row, then projected.

Source: InternVL 1.5 (arXiv 2404.16821), section 3.1, pixel shuffle.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from shared.model.tower_families import TowerFamily
from shared.model.towers.tiles import TileTower


class InternVLModule(nn.Module):
    """Tower, pixel shuffle, projector."""

    def __init__(self, config: Any, family: TowerFamily) -> None:
        from transformers import AutoModel

        super().__init__()
        projector: Any = getattr(importlib.import_module(family.module), family.class_name)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.projector = projector(config)
        self._layer = config.vision_feature_layer
        self._block = round(1 / config.downsample_ratio)

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """`[n, channels, height, width]` to `[n, tokens_per_tile, hidden]`."""
        output = self.vision_tower(tiles, output_hidden_states=self._layer != -1)
        last = output.last_hidden_state
        features = last if self._layer == -1 else output.hidden_states[self._layer]
        projected: torch.Tensor = self.projector(join_blocks(features[:, 1:], self._block))
        return projected


def join_blocks(features: torch.Tensor, block: int) -> torch.Tensor:
    """Features of `block` by `block` patches become one row: `[n, side * side, hidden]` to
    `[n, (side / block) ** 2, block * block * hidden]`, row by row inside a block."""
    side = int(features.shape[1] ** 0.5)
    blocks = side // block
    grid = features.reshape(-1, blocks, block, blocks, block, features.shape[-1])
    return grid.transpose(2, 3).flatten(3, 5).flatten(1, 2)


class InternVLTower(TileTower):
    """Tiles row by row, then the whole picture."""

    @staticmethod
    def assemble(config: Any, family: TowerFamily) -> nn.Module:
        return InternVLModule(config, family)
