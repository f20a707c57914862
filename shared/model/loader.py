"""From a model name to loaded parts.

In: a folder or a hub id, and which part is wanted. Out: a language model or a vision tower with its
weights, and nothing of the other part. Parts are built on the meta device, get uninitialised memory
once, and are filled straight from safetensors.
"""

from __future__ import annotations

from pathlib import Path

import torch

from shared.cache.kv_cache import TORCH_DTYPES
from shared.errors import ModelLoadError, UnsupportedModel
from shared.model.attention import AttentionBackend
from shared.model.checkpoint import ProgressCallback, fill_from_checkpoint
from shared.model.decoder import LanguageModel
from shared.model.towers import VisionTower
from shared.modelspec import ModelSpec

_HUB_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]


def resolve_model_dir(model: str) -> Path:
    """The folder of a model: a local path as it is, or a hub id, downloaded on first use."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or model.count("/") != 1:
        raise ModelLoadError(f"{model!r} is neither a folder nor a hub id of the form owner/name")
    # Imported here: a process that serves a local folder needs no hub client.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=_HUB_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelLoadError(
            f"{model!r} is no local folder and could not be downloaded: {error}"
        ) from error


def load_language_model(
    model_dir: Path,
    spec: ModelSpec | None = None,
    *,
    dtype: str | None = None,
    device: torch.device | str = "cpu",
    backend: AttentionBackend | None = None,
    on_progress: ProgressCallback | None = None,
) -> LanguageModel:
    """The decoder alone, in `dtype` (a name, the config's by default) on `device`."""
    spec = spec or ModelSpec.load(model_dir)
    with torch.device("meta"):
        model = LanguageModel(spec.text, TORCH_DTYPES[dtype or spec.dtype], backend=backend)
    model.to_empty(device=device)
    fill_from_checkpoint(
        model_dir,
        spec.family,
        "language",
        model.checkpoint_views(),
        optional=frozenset({"lm_head.weight"} if spec.text.tie_word_embeddings else ()),
        on_progress=on_progress,
    )
    return model


def load_vision_tower(
    model_dir: Path,
    spec: ModelSpec | None = None,
    *,
    dtype: str | None = None,
    device: torch.device | str = "cpu",
    on_progress: ProgressCallback | None = None,
) -> VisionTower:
    """The vision tower alone; `UnsupportedModel` for a text-only model."""
    spec = spec or ModelSpec.load(model_dir)
    if spec.vision is None or spec.family.tower is None:
        raise UnsupportedModel(f"model_type={spec.model_type!r} has no vision tower")
    tower = VisionTower.build(
        model_dir, spec.family.tower, spec.vision, TORCH_DTYPES[dtype or spec.dtype], device
    )
    fill_from_checkpoint(
        model_dir,
        spec.family,
        "vision",
        tower.checkpoint_views(),
        on_progress=on_progress,
    )
    return tower
