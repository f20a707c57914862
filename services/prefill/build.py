"""A prefill stage from a model folder: the language model and nothing of the vision tower."""

from __future__ import annotations

import asyncio

from services.prefill.embeddings import EmbeddingReceiver
from services.prefill.executor import PrefillExecutor
from services.prefill.job import PrefillJob
from services.prefill.own_encoder import OwnEncoder
from services.prefill.pieces import PiecePlan
from services.prefill.scheduler import PrefillScheduler
from services.prefill.settings import SHARED_PASS_TOKENS, PrefillSettings
from services.prefill.stage import PrefillLinks, PrefillStage
from shared.bus import subjects
from shared.cache.kv_cache import TORCH_DTYPES
from shared.cache.prefix import PrefixCache
from shared.messages.control import Role
from shared.messages.work import DecodeTask, EncodeTask, PrefillTask
from shared.model.forward_step import LayeredModel
from shared.model.gpu.graph_limits import PrefillGraphLimits
from shared.model.gpu.graph_recorder import CudaGraphRecorder
from shared.model.gpu.prefill_graphs import PrefillGraphs
from shared.model.grammar import Grammars
from shared.runtime.directory import WorkerDirectory
from shared.runtime.embedding_index import open_index
from shared.runtime.host import ModelFolder
from shared.runtime.language import Language, open_language
from shared.runtime.local_encoder import LocalEncoder
from shared.runtime.worker import Worker
from shared.telemetry.metrics import PrefillMetrics, PrefixCacheCollector
from shared.transport.landing import Landing


async def build(
    worker: Worker,
    folder: ModelFolder,
    settings: PrefillSettings,
    language: Language | None = None,
    encoder: LocalEncoder | None = None,
) -> PrefillStage:
    """Load the model, unless the process has it already, and join it to the worker.

    `encoder` is the process' own, if it has one.
    """
    language = language or await open_language(
        worker, folder, block_size=settings.block_size, kv_bytes=settings.kv_bytes
    )
    model = await asyncio.to_thread(layered_model, language, settings)
    landing = Landing(settings.landing_bytes)
    worker.transport.watch_quarantine(landing.set_quarantined)
    links = await open_links(worker, folder, settings, encoder)
    return PrefillStage(
        worker,
        links,
        executor=PrefillExecutor(model, language.kv, folder.spec),
        scheduler=make_scheduler(worker, folder, language, settings),
        landing=landing,
        plan=piece_plan(language, settings, folder.device),
        max_held=settings.max_held,
        hand_over=language.hand_over,
        grammars=Grammars(folder.directory, folder.spec),
    )


def layered_model(language: Language, settings: PrefillSettings) -> LayeredModel:
    """On a GPU with graphs of short prompts, which are captured at once. Blocks."""
    kv, graphs, scratch_block_id = language.kv, settings.graphs, language.scratch_block_id
    if not graphs.memory_bytes or not graphs.prompt_tokens or scratch_block_id is None:
        return language.model
    cache_tokens = language.pool.num_blocks * kv.block_size
    limits = PrefillGraphLimits(
        max_tokens=min(graphs.prompt_tokens, settings.max_batch_tokens),
        max_context_tokens=min(graphs.context_tokens, cache_tokens),
        max_bytes=graphs.memory_bytes,
    )
    recorder = CudaGraphRecorder(kv.device, limits.max_bytes)
    return PrefillGraphs(language.model, kv, limits, scratch_block_id, recorder)


def make_scheduler(
    worker: Worker, folder: ModelFolder, language: Language, settings: PrefillSettings
) -> PrefillScheduler[PrefillJob]:
    """The scheduler over a pool, whose idle blocks are a prefix cache unless that is off."""
    pool, prefix = language.pool, None
    if settings.prefix_cache:
        geometry = language.kv.geometry
        # A process that comes back to prefill finds what it had cached.
        prefix = pool.keeper if isinstance(pool.keeper, PrefixCache) else None
        prefix = prefix or PrefixCache(
            pool, salt=geometry.compatibility_hash(folder.spec.fingerprint)
        )
        worker.registry.register(PrefixCacheCollector(prefix.counters))
    max_batch_tokens, chunk_tokens = step_limits(
        settings, device=folder.device, beside_decode=language.hand_over is not None
    )
    # Where the tower is in this process it takes turns with prefill: beginnings would hold it up.
    overlaps = settings.overlap_encode and Role.ENCODE not in worker.stages
    return PrefillScheduler(
        pool,
        max_batch_tokens=max_batch_tokens,
        chunk_tokens=chunk_tokens,
        max_suspended=settings.max_suspended,
        priority_step_s=settings.priority_step_s,
        prefix=prefix,
        min_early_tokens=settings.min_early_tokens if overlaps else 0,
        reserves_answers=language.hand_over is not None,
    )


def piece_plan(language: Language, settings: PrefillSettings, device: str) -> PiecePlan:
    """How KV travels: in the pieces in which the scheduler computes it."""
    _, chunk_tokens = step_limits(
        settings, device=device, beside_decode=language.hand_over is not None
    )
    return PiecePlan(settings.kv_transfer, language.kv.geometry, chunk_tokens)


def step_limits(settings: PrefillSettings, *, device: str, beside_decode: bool) -> tuple[int, int]:
    """Tokens of a step, and of one prompt in it (0: all).

    Prefill and decode take turns on the device, so a step of the one is a pause of the other.
    """
    max_tokens, chunk_tokens = settings.max_batch_tokens, settings.chunk_tokens
    if device == "cpu" and settings.core_lock:
        max_tokens = min(max_tokens, SHARED_PASS_TOKENS)
    if not beside_decode or not settings.mixed_step_tokens:
        return max_tokens, chunk_tokens
    max_tokens = min(max_tokens, settings.mixed_step_tokens)
    return max_tokens, min(chunk_tokens or max_tokens, max_tokens)


async def open_links(
    worker: Worker,
    folder: ModelFolder,
    settings: PrefillSettings,
    encoder: LocalEncoder | None = None,
) -> PrefillLinks:
    """The stage's queues and its way to embeddings."""
    bus, model = worker.bus, worker.model
    metrics = PrefillMetrics.create(worker.registry)
    directory = WorkerDirectory(bus, ttl_s=settings.registration_ttl_s, model=model)
    index = await open_index(bus, directory, worker.cancellations)
    receiver = EmbeddingReceiver(
        index,
        worker.transport,
        await bus.work_queue(subjects.work(Role.ENCODE, model), EncodeTask),
        me=worker.me,
        hidden_size=folder.spec.embedding_width,
        dtype=TORCH_DTYPES[folder.dtype],
        pool_bytes=settings.embedding_pool_bytes,
        pull_timeout_s=settings.transfer.pull_timeout_s,
        metrics=metrics,
        own_encoder=None
        if encoder is None
        else OwnEncoder(
            encoder,
            index,
            worker.me,
            lambda: [each.worker for each in directory.live(Role.ENCODE, ready_only=True)],
        ),
    )
    return PrefillLinks(
        tasks=await bus.work_queue(subjects.work(Role.PREFILL, model), PrefillTask),
        decode_tasks=await bus.work_queue(subjects.work(Role.DECODE, model), DecodeTask),
        index=index,
        receiver=receiver,
        metrics=metrics,
    )
