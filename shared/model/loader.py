"""From a model name to loaded parts.

In: a folder or a hub id, and which part is wanted. Out: a language model or a tower with its
weights, and nothing of the other part. Parts are built on the meta device, get uninitialised memory
once, and are filled straight from safetensors.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from shared.cache.kv_cache import TORCH_DTYPES
from shared.errors import UnsupportedModel
from shared.model.attention import AttentionBackend
from shared.model.checkpoint import ProgressCallback, fill_from_checkpoint, part_names
from shared.model.decoder import LanguageModel
from shared.model.gpu.backend import backend_for
from shared.model.kernels.choice import KernelChoice, log_kernels
from shared.model.linear import Rows
from shared.model.towers.base import Tower
from shared.model.towers.build import build_tower
from shared.modelspec import ModelSpec


def load_language_model(
    model_dir: Path,
    spec: ModelSpec | None = None,
    *,
    dtype: str | None = None,
    device: torch.device | str = "cpu",
    backend: AttentionBackend | None = None,
    kernels: KernelChoice | None = None,
    on_progress: ProgressCallback | None = None,
) -> LanguageModel:
    """The decoder alone, in `dtype` (a name, the config's by default) on `device`.

    `kernels` says what computes its linear maps; torch's own operators without it.
    """
    spec = spec or ModelSpec.load(model_dir)
    backend = backend or backend_for(device, spec.text.num_heads)
    with torch.device("meta"):
        model = LanguageModel(spec.text, TORCH_DTYPES[dtype or spec.dtype], backend=backend)
    model.to_empty(device=device)
    fill_from_checkpoint(
        model_dir,
        spec.family,
        "language",
        model.checkpoint_views(part_names(model_dir, spec.family, "language")),
        optional=frozenset({"lm_head.weight"} if spec.text.tie_word_embeddings else ()),
        on_progress=on_progress,
    )
    if kernels is not None:
        head = replace(kernels, rows=Rows.FEW)
        log_kernels(model.prepare_linears(kernels.kernel_for, head.kernel_for))
    return model


def load_tower(
    model_dir: Path,
    spec: ModelSpec | None = None,
    *,
    dtype: str | None = None,
    device: torch.device | str = "cpu",
    on_progress: ProgressCallback | None = None,
) -> Tower:
    """The tower for pictures or sound alone; `UnsupportedModel` for a text-only model."""
    tower = load_plain_tower(model_dir, spec, dtype=dtype, device=device, on_progress=on_progress)
    tower.quicken()
    return tower


def load_plain_tower(
    model_dir: Path,
    spec: ModelSpec | None = None,
    *,
    dtype: str | None = None,
    device: torch.device | str = "cpu",
    on_progress: ProgressCallback | None = None,
) -> Tower:
    """The same before it takes the device's own kernels."""
    spec = spec or ModelSpec.load(model_dir)
    tower_spec = spec.vision or spec.audio
    if tower_spec is None or spec.family.tower is None:
        raise UnsupportedModel(f"model_type={spec.model_type!r} has neither vision nor audio tower")
    tower = build_tower(
        model_dir, spec.family.tower, tower_spec, TORCH_DTYPES[dtype or spec.dtype], device
    )
    fill_from_checkpoint(
        model_dir,
        spec.family,
        "tower",
        tower.checkpoint_views(),
        on_progress=on_progress,
    )
    return tower
