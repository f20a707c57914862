"""Gemma 3, Idefics3 and SmolVLM: SigLIP's last features through the family's own projector, which
pools them (Gemma 3) or joins neighbours (Idefics3)."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from shared.model.tower_families import TowerFamily
from shared.model.towers.tiles import TileTower


class ProjectedModule(nn.Module):
    """Tower and projector, nothing in between."""

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


class ProjectedTower(TileTower):
    """Tiles in the order of the sizing rule."""

    @staticmethod
    def assemble(config: Any, family: TowerFamily) -> nn.Module:
        return ProjectedModule(config, family)
