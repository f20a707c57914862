"""LLaVA 1.5: features of an inner layer of CLIP or SigLIP through a projector."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from shared.model.tower_families import TowerFamily
from shared.model.towers.tiles import TileTower


class LlavaModule(nn.Module):
    """Tower, choice of features, projector; `image_newline` where the family has one."""

    image_newline: nn.Parameter

    def __init__(self, config: Any, family: TowerFamily, *, has_newline: bool = False) -> None:
        from transformers import AutoModel

        super().__init__()
        projector: Any = getattr(importlib.import_module(family.module), family.class_name)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.projector = projector(config)
        newline = nn.Parameter(torch.empty(config.text_config.hidden_size))
        self.register_parameter("image_newline", newline if has_newline else None)
        layers = config.vision_feature_layer
        self._layers = [layers] if isinstance(layers, int) else list(layers)
        # CLIP's first feature belongs to no patch.
        self._first = 1 if config.vision_feature_select_strategy == "default" else 0

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """`[n, channels, height, width]` to `[n, tokens_per_tile, hidden]`."""
        hidden = self.vision_tower(tiles, output_hidden_states=True).hidden_states
        chosen = torch.cat([hidden[layer][:, self._first :] for layer in self._layers], dim=-1)
        projected: torch.Tensor = self.projector(chosen)
        return projected


class LlavaTower(TileTower):
    """One tile a picture."""

    @staticmethod
    def assemble(config: Any, family: TowerFamily) -> nn.Module:
        return LlavaModule(config, family)
