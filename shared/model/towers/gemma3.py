"""Gemma 3: SigLIP's features, pooled to a fixed number of rows and projected."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from shared.model.tower_families import TowerFamily
from shared.model.towers.tiles import TileTower


class Gemma3Module(nn.Module):
    """Tower and pooling projector."""

    def __init__(self, config: Any, family: TowerFamily) -> None:
        from transformers import AutoModel

        super().__init__()
        projector: Any = getattr(importlib.import_module(family.module), family.class_name)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.projector = projector(config)

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """`[n, channels, height, width]` to `[n, tokens_per_tile, hidden]`."""
        projected: torch.Tensor = self.projector(self.vision_tower(tiles).last_hidden_state)
        return projected


class Gemma3Tower(TileTower):
    """One tile a picture."""

    @staticmethod
    def assemble(config: Any, family: TowerFamily) -> nn.Module:
        return Gemma3Module(config, family)
