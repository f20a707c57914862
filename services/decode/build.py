"""A decode stage from a model folder: the language model and nothing of the vision tower."""

from __future__ import annotations

import asyncio

from services.decode.executor import DecodeExecutor
from services.decode.scheduler import DecodeScheduler
from services.decode.settings import DecodeSettings
from services.decode.stage import DecodeStage
from shared.bus import subjects
from shared.cache.block_pool import BlockPool
from shared.messages.control import Role
from shared.messages.work import DecodeTask
from shared.model.grammar import Grammars
from shared.runtime.host import ModelFolder
from shared.runtime.kv_memory import num_kv_blocks
from shared.runtime.language import load_language
from shared.runtime.worker import Worker
from shared.telemetry.metrics import watch_kv_usage
from shared.transport.landing import Landing


def load_executor(folder: ModelFolder, block_size: int, num_blocks: int) -> DecodeExecutor:
    """The language model and its KV cache, from the folder's language weights only. Blocks."""
    model, kv = load_language(folder, block_size, num_blocks)
    return DecodeExecutor(model, kv)


async def build(worker: Worker, folder: ModelFolder, settings: DecodeSettings) -> DecodeStage:
    """Load the model and join it to the worker."""
    geometry = folder.geometry(settings.block_size)
    num_blocks = num_kv_blocks(geometry, settings.kv_bytes)
    executor = await asyncio.to_thread(load_executor, folder, settings.block_size, num_blocks)
    pool = BlockPool(num_blocks, settings.block_size, name="decode KV")
    watch_kv_usage(worker.registry, Role.DECODE.value, lambda: pool.num_used / num_blocks)
    landing = Landing(settings.landing_bytes)
    worker.transport.watch_quarantine(landing.set_quarantined)
    return DecodeStage(
        worker,
        await worker.bus.work_queue(subjects.work(Role.DECODE, worker.model), DecodeTask),
        executor=executor,
        scheduler=DecodeScheduler(pool, max_batch=settings.max_batch),
        landing=landing,
        geometry=geometry,
        pull_timeout_s=settings.transfer.pull_timeout_s,
        grammars=Grammars(folder.directory, folder.spec),
    )
