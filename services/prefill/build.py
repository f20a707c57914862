"""A prefill stage from a model folder: the language model and nothing of the vision tower."""

from __future__ import annotations

import asyncio

from services.prefill.embeddings import EmbeddingIndex, EmbeddingReceiver
from services.prefill.executor import PrefillExecutor
from services.prefill.scheduler import PrefillScheduler
from services.prefill.settings import PrefillSettings
from services.prefill.stage import PrefillLinks, PrefillStage
from shared.bus import subjects
from shared.cache.block_pool import BlockPool
from shared.cache.kv_cache import TORCH_DTYPES
from shared.messages.control import Role
from shared.messages.work import DecodeTask, EncodeTask, PrefillTask
from shared.model.grammar import Grammars
from shared.runtime.host import ModelFolder
from shared.runtime.kv_memory import num_kv_blocks
from shared.runtime.language import load_language
from shared.runtime.worker import Worker
from shared.telemetry.metrics import PrefillMetrics, watch_kv_usage
from shared.transport.landing import Landing


def load_executor(folder: ModelFolder, block_size: int, num_blocks: int) -> PrefillExecutor:
    """The language model and its KV cache, from the folder's language weights only. Blocks."""
    model, kv = load_language(folder, block_size, num_blocks)
    return PrefillExecutor(model, kv, folder.spec)


async def build(worker: Worker, folder: ModelFolder, settings: PrefillSettings) -> PrefillStage:
    """Load the model and join it to the worker."""
    geometry = folder.geometry(settings.block_size)
    num_blocks = num_kv_blocks(geometry, settings.kv_bytes)
    executor = await asyncio.to_thread(load_executor, folder, settings.block_size, num_blocks)
    pool = BlockPool(num_blocks, settings.block_size, name="prefill KV")
    watch_kv_usage(worker.registry, Role.PREFILL.value, lambda: pool.num_used / num_blocks)
    landing = Landing(settings.landing_bytes)
    worker.transport.watch_quarantine(landing.set_quarantined)
    links = await open_links(worker, folder, settings)
    return PrefillStage(
        worker,
        links,
        executor=executor,
        scheduler=PrefillScheduler(pool, max_batch_tokens=settings.max_batch_tokens),
        landing=landing,
        geometry=geometry,
        max_held=settings.max_held,
        grammars=Grammars(folder.directory, folder.spec),
    )


async def open_links(
    worker: Worker, folder: ModelFolder, settings: PrefillSettings
) -> PrefillLinks:
    """The stage's queues and its way to embeddings."""
    bus, model = worker.bus, worker.model
    metrics = PrefillMetrics.create(worker.registry)
    index = EmbeddingIndex(
        await bus.key_value(subjects.EMBEDDINGS_BUCKET, ttl_s=subjects.EMBEDDINGS_TTL_S)
    )
    receiver = EmbeddingReceiver(
        index,
        worker.transport,
        await bus.work_queue(subjects.work(Role.ENCODE, model), EncodeTask),
        hidden_size=folder.spec.text.hidden_size,
        dtype=TORCH_DTYPES[folder.dtype],
        pull_timeout_s=settings.transfer.pull_timeout_s,
        metrics=metrics,
    )
    return PrefillLinks(
        tasks=await bus.work_queue(subjects.work(Role.PREFILL, model), PrefillTask),
        decode_tasks=await bus.work_queue(subjects.work(Role.DECODE, model), DecodeTask),
        index=index,
        receiver=receiver,
        metrics=metrics,
    )
