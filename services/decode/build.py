"""A decode stage from a model folder: the language model and nothing of the vision tower."""

from __future__ import annotations

import asyncio

from services.decode.departure import Departure
from services.decode.drafting import load_speculator
from services.decode.executor import DecodeExecutor
from services.decode.scheduler import DecodeScheduler, ReservePolicy
from services.decode.settings import DecodeSettings
from services.decode.stage import DecodeStage
from services.decode.steps import decode_steps
from shared.bus import subjects
from shared.messages.control import Role
from shared.messages.work import DecodeTask
from shared.model.grammar import Grammars
from shared.runtime.host import ModelFolder
from shared.runtime.language import Language, open_language
from shared.runtime.worker import Worker
from shared.transport.landing import Landing


def reserve_policy(settings: DecodeSettings, bytes_per_block: int) -> ReservePolicy:
    """The scheduler's part of the settings, in blocks."""
    speculation = settings.speculation
    return ReservePolicy(
        settings.reserve,
        headroom_tokens=settings.headroom_tokens,
        swap_blocks=settings.swap_bytes // bytes_per_block,
        max_draft_tokens=0 if speculation.mode == "off" else speculation.max_draft_tokens,
    )


async def build(
    worker: Worker,
    folder: ModelFolder,
    settings: DecodeSettings,
    language: Language | None = None,
) -> DecodeStage:
    """Load the model, unless the process has it already, and join it to the worker."""
    # Before the larger part: a draft model that does not fit is told at once.
    speculator = await worker.compute(
        load_speculator, folder, settings.speculation, settings.block_size
    )
    language = language or await open_language(
        worker, folder, block_size=settings.block_size, kv_bytes=settings.kv_bytes
    )
    steps = await asyncio.to_thread(decode_steps, language, settings)
    landing = Landing(settings.landing_bytes)
    worker.transport.watch_quarantine(landing.set_quarantined)
    tasks = await worker.bus.work_queue(subjects.work(Role.DECODE, worker.model), DecodeTask)
    return DecodeStage(
        worker,
        tasks,
        executor=DecodeExecutor(language.model, language.kv, steps=steps, speculator=speculator),
        scheduler=DecodeScheduler(
            language.pool,
            max_batch=settings.max_batch,
            policy=reserve_policy(settings, language.kv.geometry.bytes_per_block),
        ),
        landing=landing,
        kv=language.kv,
        pull_timeout_s=settings.transfer.pull_timeout_s,
        hand_over=language.hand_over,
        departure=Departure(worker, tasks, language.kv, language.pool),
        grammars=Grammars(folder.directory, folder.spec),
    )
