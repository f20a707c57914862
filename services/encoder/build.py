"""An encode stage from a model folder: the tower and nothing else of the weights."""

from __future__ import annotations

import asyncio

from services.encoder.executor import EncodeExecutor
from services.encoder.preprocess import open_preprocessor
from services.encoder.scheduler import EncodeScheduler
from services.encoder.settings import EncoderSettings
from services.encoder.stage import EncodeStage, open_stores
from shared.cache.geometry import DTYPE_BYTES
from shared.cache.kv_cache import TORCH_DTYPES
from shared.media.picture import PictureLimits
from shared.model.kernels.choice import has_bf16_instructions
from shared.model.loader import load_tower
from shared.runtime.host import ModelFolder, weights_progress
from shared.runtime.worker import Worker


def load_executor(folder: ModelFolder) -> EncodeExecutor:
    """The tower, from the folder's tower weights only. Blocks.

    A CPU that only emulates bfloat16 computes the tower in float32, several times faster for twice
    the memory; the embeddings are in the model's dtype all the same.
    """
    widens = folder.device == "cpu" and folder.dtype == "bfloat16" and not has_bf16_instructions()
    tower = load_tower(
        folder.directory,
        folder.spec,
        dtype="float32" if widens else folder.dtype,
        device=folder.device,
        on_progress=weights_progress(),
    )
    return EncodeExecutor(tower, TORCH_DTYPES[folder.dtype])


async def build(worker: Worker, folder: ModelFolder, settings: EncoderSettings) -> EncodeStage:
    """Load the tower and the preprocessor and join them to the worker."""
    executor = await worker.compute(load_executor, folder)
    limits = PictureLimits(settings.max_picture_bytes, settings.max_picture_pixels)
    preprocess = await asyncio.to_thread(open_preprocessor, folder.directory, limits)
    stores = await open_stores(
        worker,
        media_ttl_s=settings.media_ttl_s,
        media_bytes=settings.media_store_bytes,
        registration_ttl_s=settings.registration_ttl_s,
    )
    return EncodeStage(
        worker,
        stores,
        executor=executor,
        preprocess=preprocess,
        scheduler=EncodeScheduler(settings.max_batch_patches),
        pool_bytes=settings.embedding_pool_bytes,
        bytes_per_token=folder.spec.embedding_width * DTYPE_BYTES[folder.dtype],
        max_held=settings.max_held,
        preprocess_threads=settings.preprocess_threads,
    )
