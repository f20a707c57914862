"""A decode stage from a model folder: the language model and nothing of the vision tower."""

from __future__ import annotations

from services.decode.executor import DecodeExecutor
from services.decode.scheduler import DecodeScheduler
from services.decode.settings import DecodeSettings
from services.decode.stage import DecodeStage
from shared.bus import subjects
from shared.messages.control import Role
from shared.messages.work import DecodeTask
from shared.runtime.host import ModelFolder
from shared.runtime.language import Language, open_language
from shared.runtime.worker import Worker
from shared.transport.landing import Landing


async def build(
    worker: Worker,
    folder: ModelFolder,
    settings: DecodeSettings,
    language: Language | None = None,
) -> DecodeStage:
    """Load the model, unless the process has it already, and join it to the worker."""
    language = language or await open_language(
        worker, folder, block_size=settings.block_size, kv_bytes=settings.kv_bytes
    )
    landing = Landing(settings.landing_bytes)
    worker.transport.watch_quarantine(landing.set_quarantined)
    return DecodeStage(
        worker,
        await worker.bus.work_queue(subjects.work(Role.DECODE, worker.model), DecodeTask),
        executor=DecodeExecutor(language.model, language.kv),
        scheduler=DecodeScheduler(language.pool, max_batch=settings.max_batch),
        landing=landing,
        geometry=language.kv.geometry,
        pull_timeout_s=settings.transfer.pull_timeout_s,
        hand_over=language.hand_over,
    )
