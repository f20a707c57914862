"""A family's tower without weights: the loader fills it.

In: a model folder's config and what the table says about the family. Out: a `Tower` with
uninitialised parameters and computed buffers. The language model is never built.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shared.model.audio_spec import AudioSpec
from shared.model.tower_families import TowerFamily, TowerKind
from shared.model.towers.anyres import AnyresTower
from shared.model.towers.audio import AudioTower
from shared.model.towers.base import Tower
from shared.model.towers.internvl import InternVLTower
from shared.model.towers.llava import LlavaTower
from shared.model.towers.patches import PatchTower
from shared.model.towers.projected import ProjectedTower
from shared.model.vision.spec import VisionSpec

_KINDS: Mapping[TowerKind, type[Tower]] = {
    "patches": PatchTower,
    "llava": LlavaTower,
    "anyres": AnyresTower,
    "gemma3": ProjectedTower,
    "internvl": InternVLTower,
    "idefics3": ProjectedTower,
    "audio": AudioTower,
}


def build_tower(
    model_dir: Path,
    family: TowerFamily,
    spec: VisionSpec | AudioSpec,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tower:
    """Memory for the tower's parameters is taken once, on `device`, in `dtype`."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_dir)
    tower_config = getattr(config, family.config_field)
    tower_config._attn_implementation = "sdpa"
    kind = _KINDS[family.kind]
    with torch.device("meta"):
        module = kind.assemble(config, family)
    # Buffers (frequencies, indices) are computed, not loaded: on the meta device they were lost,
    # and frequencies stay float32 whatever the parameters are.
    buffers = list(_computed_buffers(module, tower_config))
    module.to(dtype).to_empty(device=device).requires_grad_(False)
    for owner, name, buffer in buffers:
        owner.register_buffer(name, buffer.to(device), persistent=False)
    return kind(module.eval(), spec)


def _computed_buffers(
    module: nn.Module, tower_config: Any
) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    """Each buffer anew, from a second copy of the small module that owns it."""
    for owner in module.modules():
        names = [name for name, _ in owner.named_buffers(recurse=False)]
        if names:
            fresh = dict(type(owner)(tower_config).named_buffers(recurse=False))
            yield from ((owner, name, fresh[name]) for name in names)
