"""The language part of a model with its KV cache, as prefill and decode both need it."""

from __future__ import annotations

from shared.cache.kv_cache import KvCache
from shared.model.cpu_attention import CpuAttention
from shared.model.decoder import LanguageModel
from shared.model.loader import load_language_model
from shared.runtime.host import ModelFolder, weights_progress


def load_language(
    folder: ModelFolder, block_size: int, num_blocks: int
) -> tuple[LanguageModel, KvCache]:
    """Read the folder's language weights, and only those, and make an empty cache. Blocks."""
    model = load_language_model(
        folder.directory,
        folder.spec,
        dtype=folder.dtype,
        device=folder.device,
        backend=CpuAttention() if folder.device == "cpu" else None,
        kernels=folder.kernels,
        on_progress=weights_progress(),
    )
    return model, KvCache(folder.geometry(block_size), num_blocks, device=folder.device)
