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

from shared.model.gpu import towers
from shared.model.gpu.tower_layouts import TowerLayouts, has_layouts
from shared.model.tower_families import TowerFamily
from shared.model.towers import patch_layers
from shared.model.towers.base import VisionTower
from shared.model.towers.patch_projection import PatchProjection
from shared.model.towers.pixels import Pixels

WARM_UP_SIDE = 6
"""Merged patches: more than a window holds, so that all kinds of attention are met."""


class PatchTower(VisionTower):
    """The whole tower is one module of transformers."""

    _layouts: TowerLayouts | None = None

    @staticmethod
    def assemble(config: Any, family: TowerFamily) -> nn.Module:
        tower_class: Any = getattr(importlib.import_module(family.module), family.class_name)
        tower: Any = tower_class(config.vision_config)
        tower.patch_embed.proj = PatchProjection(tower.patch_embed.proj)
        module: nn.Module = tower
        return module

    def quicken(self) -> None:
        """On a GPU, kernels are compiled here rather than with the first request."""
        if self.device.type == "cpu":
            patch_layers.quicken(self.module)
            return
        towers.quicken(self.module)
        if has_layouts():
            self._layouts = TowerLayouts(self.module, self.device)
        self._warm_up()

    def _warm_up(self) -> None:
        length = WARM_UP_SIDE * self.spec.merge_size
        values = torch.zeros(length**2, self.spec.patch_dim, dtype=self.dtype)
        self.encode([Pixels(values, (1, length, length))])

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Pixels]) -> list[torch.Tensor]:
        """Packed end to end: no padding, whatever their sizes."""
        grids = tuple(each.grid_thw for each in pictures)
        num_patches = sum(t * h * w for t, h, w in grids)
        values = self.pack(pictures)
        if values.shape != (num_patches, self.spec.patch_dim):
            raise ValueError(
                f"pixel_values {list(values.shape)} for grids of {num_patches} patches "
                f"of {self.spec.patch_dim} values"
            )
        layout = {} if self._layouts is None else self._layouts.of(grids)
        output = self.module(values, grid_thw=torch.tensor(grids, device=self.device), **layout)
        rows = output.pooler_output
        if self.spec.num_deepstack_layers:
            rows = torch.cat((rows, *output.deepstack_features), dim=-1)
        return list(torch.split(rows, [self.spec.num_tokens(grid) for grid in grids]))
