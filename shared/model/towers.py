"""Vision towers: patches in, embeddings out.

The tower itself is transformers' module; this file builds it without weights, names its tensors for
the loader and runs it over several pictures at once. transformers is imported only when a tower is
built, so that prefill and decode processes never import it. Nothing here knows the language model.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shared.model.registry import TowerFamily
from shared.modelspec import VisionSpec


class VisionTower:
    """One vision transformer with its weights."""

    def __init__(self, module: nn.Module, spec: VisionSpec) -> None:
        self.module = module
        self.spec = spec

    @classmethod
    def build(
        cls,
        model_dir: Path,
        family: TowerFamily,
        spec: VisionSpec,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> VisionTower:
        """A tower with uninitialised weights; the loader fills them."""
        from transformers import AutoConfig

        tower_class: Any = getattr(importlib.import_module(family.module), family.class_name)
        config = AutoConfig.from_pretrained(model_dir).vision_config
        config._attn_implementation = "sdpa"
        with torch.device("meta"):
            module = tower_class(config)
        # Frequencies are computed, not loaded: on the meta device they were lost.
        rotary = type(module.rotary_pos_emb)(config)
        module.to(dtype).to_empty(device=device).requires_grad_(False)
        module.rotary_pos_emb = rotary.to(device)
        return cls(module.eval(), spec)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    @torch.inference_mode()
    def encode(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> list[torch.Tensor]:
        """Embed several pictures packed in one call.

        `pixel_values` `[num_patches, patch_dim]`, `grid_thw` `[num_pictures, 3]` in patches.
        Returns one `[num_tokens_i, hidden]` per picture, in the tower's dtype; they are views of
        one tensor.
        """
        sizes = [self.spec.num_tokens((t, h, w)) for t, h, w in grid_thw.tolist()]
        num_patches = int(grid_thw.prod(-1).sum())
        if pixel_values.shape != (num_patches, self.spec.patch_dim):
            raise ValueError(
                f"pixel_values {list(pixel_values.shape)} for grids of {num_patches} patches "
                f"of {self.spec.patch_dim} values"
            )
        output = self.module(pixel_values.to(self.dtype), grid_thw=grid_thw)
        return list(torch.split(output.pooler_output, sizes))

    def checkpoint_views(self) -> dict[str, torch.Tensor]:
        """Every checkpoint name of the vision part and the tensor it fills."""
        return {name: parameter.data for name, parameter in self.module.named_parameters()}
