"""Idefics3 and SmolVLM: SigLIP's features, joined and projected by the family's connector."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from shared.model.tower_families import TowerFamily
from shared.model.towers.tiles import TileTower


class Idefics3Module(nn.Module):
    """Tower and connector."""

    def __init__(self, config: Any, family: TowerFamily) -> None:
        from transformers import AutoModel

        super().__init__()
        connector: Any = getattr(importlib.import_module(family.module), family.class_name)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.projector = connector(config)

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """`[n, channels, height, width]` to `[n, tokens_per_tile, hidden]`."""
        projected: torch.Tensor = self.projector(self.vision_tower(tiles).last_hidden_state)
        return projected


class Idefics3Tower(TileTower):
    """Tiles row by row, then the whole picture."""

    @staticmethod
    def assemble(config: Any, family: TowerFamily) -> nn.Module:
        return Idefics3Module(config, family)
