"""What a patch tower derives from its pictures' sizes, worked out on the host and kept.

In: patch grids. Out: the arguments by which transformers takes positions, windows and bounds of
sequences that are known already. Left to itself it derives them anew in every call, by dozens of
small launches that wait for values from the device.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import Any

import torch

Grids = tuple[tuple[int, int, int], ...]

MAX_KEPT = 16
"""Combinations of sizes; one takes 20 bytes or so for each patch."""


def has_layouts() -> bool:
    """Whether this transformers takes such arguments (versions with `vision_utils`)."""
    return importlib.util.find_spec("transformers.vision_utils") is not None


class TowerLayouts:
    """Layouts for one tower of transformers `module`, on its device."""

    def __init__(self, module: Any, device: torch.device) -> None:
        self._module = module
        self._device = device
        self.of = lru_cache(MAX_KEPT)(self._of)

    def _of(self, grids: Grids) -> dict[str, Any]:
        """Keyword arguments of the tower's `forward` for pictures of these grids."""
        from transformers import vision_utils

        module, config, grid = self._module, self._module.config, torch.tensor(grids)
        merge_size = module.spatial_merge_size
        bounds, _ = vision_utils.get_vision_attention_seqlens(grid, config)
        layout = {
            "position_ids": vision_utils.get_vision_position_ids(grid, merge_size),
            "cu_seqlens": bounds,
            "max_seqlen": int(bounds.diff().max()),
        }
        if hasattr(module, "window_size"):
            layout |= _windows(module, grid)
        if hasattr(module, "num_grid_per_side"):
            indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
                grid,
                num_grid_per_side=module.num_grid_per_side,
                mode=module.interpolation_mode,
                align_corners=module.interpolation_align_corners,
                spatial_merge_size=merge_size,
            )
            layout |= {"interp_indices": indices, "interp_weights": weights}
        return {
            name: value.to(self._device) if isinstance(value, torch.Tensor) else value
            for name, value in layout.items()
        }


def _windows(module: Any, grid: torch.Tensor) -> dict[str, Any]:
    from transformers import vision_utils

    index, bounds = vision_utils.get_vision_window_index(
        grid,
        spatial_merge_size=module.spatial_merge_size,
        window_size=module.window_size,
        patch_size=module.patch_size,
    )
    return {
        "window_index": index,
        "cu_window_seqlens": bounds,
        "max_window_seqlen": int(bounds.diff().max()),
    }
