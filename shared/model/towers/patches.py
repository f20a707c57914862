"""Qwen-VL towers: pictures of any size as packed patches.

Qwen3-VL's tower also gives features for the first decoder layers (DeepStack, arXiv 2406.04334);
they travel behind the input embedding in the same row.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from shared.model.tower_families import TowerFamily
from shared.model.towers.base import VisionTower
from shared.model.towers.pixels import Pixels


class PatchTower(VisionTower):
    """The whole tower is one module of transformers."""

    @staticmethod
    def assemble(config: Any, family: TowerFamily) -> nn.Module:
        tower_class: Any = getattr(importlib.import_module(family.module), family.class_name)
        module: nn.Module = tower_class(config.vision_config)
        return module

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Pixels]) -> list[torch.Tensor]:
        """Packed end to end: no padding, whatever their sizes."""
        grids = [each.grid_thw for each in pictures]
        num_patches = sum(t * h * w for t, h, w in grids)
        values = self.pack(pictures)
        if values.shape != (num_patches, self.spec.patch_dim):
            raise ValueError(
                f"pixel_values {list(values.shape)} for grids of {num_patches} patches "
                f"of {self.spec.patch_dim} values"
            )
        output = self.module(values, grid_thw=torch.tensor(grids, device=self.device))
        rows = output.pooler_output
        if self.spec.num_deepstack_layers:
            rows = torch.cat((rows, *output.deepstack_features), dim=-1)
        return list(torch.split(rows, [self.spec.num_tokens(grid) for grid in grids]))
