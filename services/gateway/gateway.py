"""Puts a gateway together over a bus, and takes it apart again.

In: settings, a model, a bus, and a view of the workers. Out: the parts that the routes need, alive
within an `async with`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager

from services.gateway.access import OPEN, Access
from services.gateway.admission import Admission
from services.gateway.chat import Chat
from services.gateway.dispatch import Dispatcher, open_queues
from services.gateway.health import Health
from services.gateway.ingest import Ingest
from services.gateway.liveness import Liveness
from services.gateway.media import MediaLimits, MediaLoader
from services.gateway.metrics import GatewayMetrics
from services.gateway.model import ServedModel
from services.gateway.recovery import RecoveryPolicy
from services.gateway.roles import Roles
from services.gateway.routes import Parts
from services.gateway.runner import Runner
from services.gateway.settings import GatewaySettings
from services.gateway.streams import Streams
from services.gateway.traces import TraceStore
from services.gateway.workers import Workers
from shared.bus import subjects
from shared.bus.base import Bus, Headers
from shared.bus.dead_letters import DeadLetterWatcher
from shared.media.fetch import FetchPolicy, MediaFetcher
from shared.media.kind import MediaKind
from shared.media.picture import PictureLimits
from shared.media.video import VideoLimits
from shared.messages.control import CancelRequest, Role
from shared.messages.descriptor import WorkerRef
from shared.messages.events import EventBatch
from shared.messages.telemetry import SpanBatch
from shared.messages.work import DecodeTask, EncodeTask, PrefillTask, Task
from shared.runtime.cancellations import Cancellations
from shared.runtime.embedding_index import EmbeddingIndex
from shared.runtime.keep_running import kept_running


@asynccontextmanager
async def open_gateway(
    settings: GatewaySettings,
    model: ServedModel,
    bus: Bus,
    workers: Workers,
    me: WorkerRef,
    *,
    access: Access = OPEN,
    fetcher: MediaFetcher | None = None,
) -> AsyncIterator[Parts]:
    """All parts of one gateway; its subscriptions, threads and heartbeats end with the block."""
    metrics, streams = GatewayMetrics(), Streams()
    traces = TraceStore(settings.traces)
    admission = Admission(settings.admission)
    health = Health(model, workers, settings.admission.retry_after_s)
    fetcher = fetcher or MediaFetcher(_fetch_policy(settings))
    async with AsyncExitStack() as scope:
        pool = scope.enter_context(_threads(settings.media.threads))
        scope.push_async_callback(fetcher.close)
        liveness = await scope.enter_async_context(_liveness(bus, me, streams))
        index = await scope.enter_async_context(_embedding_index(bus, workers))
        runner = Runner(
            await _dispatcher(settings, model, bus, index, workers, metrics),
            streams,
            liveness,
            workers,
            model.tokenizer,
            RecoveryPolicy(**settings.recovery.model_dump()),
        )
        chat = Chat(
            admission,
            _ingest(settings, model, me, fetcher, pool),
            health,
            runner,
            metrics,
            settings.admission.retry_after_s,
            settings.admission.send_timeout_s,
        )
        _watch(metrics, admission, streams)
        await scope.enter_async_context(_listening(bus, me, model.name, streams, traces))
        roles = Roles(bus, workers)
        yield Parts(chat, health, metrics, traces, roles, access, int(time.time()))


@asynccontextmanager
async def _listening(
    bus: Bus, me: WorkerRef, model: str, streams: Streams, traces: TraceStore
) -> AsyncIterator[None]:
    """Events, dead letters and spans reach their handlers within."""
    async with AsyncExitStack() as scope:
        for subscription in (
            await bus.subscribe(subjects.events(me), EventBatch, streams.on_batch),
            await bus.subscribe(subjects.SPANS, SpanBatch, traces.on_batch),
        ):
            scope.push_async_callback(subscription.close)
        await scope.enter_async_context(
            DeadLetterWatcher(bus, _work_subjects(model), streams.on_dead_letter)
        )
        yield


def _work_subjects(model: str) -> dict[str, type[Task]]:
    kinds: dict[Role, type[Task]] = {
        Role.ENCODE: EncodeTask,
        Role.PREFILL: PrefillTask,
        Role.DECODE: DecodeTask,
    }
    return {subjects.work(role, model): kind for role, kind in kinds.items()}


async def _dispatcher(
    settings: GatewaySettings,
    model: ServedModel,
    bus: Bus,
    index: EmbeddingIndex,
    workers: Workers,
    metrics: GatewayMetrics,
) -> Dispatcher:
    media = await bus.object_store(
        subjects.MEDIA_BUCKET,
        ttl_s=settings.media.store_ttl_s,
        max_bytes=settings.media.store_bytes,
    )
    queues = await open_queues(bus, model.name)
    return Dispatcher(
        queues,
        media,
        index,
        store_ttl_s=settings.media.store_ttl_s,
        count=lambda outcome: metrics.embeddings.labels(outcome).inc(),
        encoders=lambda: [
            each.worker for each in workers.live() if each.ready and Role.ENCODE in each.stages
        ],
        min_part_patches=settings.media.min_part_patches,
    )


@asynccontextmanager
async def _embedding_index(bus: Bus, workers: Workers) -> AsyncIterator[EmbeddingIndex]:
    """The cluster's index, followed within; it hears the cancellations of all gateways."""
    cancellations = Cancellations()

    async def on_cancel(message: CancelRequest, headers: Headers) -> None:
        cancellations.cancel(message.request_id, message.attempt)

    index = EmbeddingIndex(
        await bus.key_value(subjects.EMBEDDINGS_BUCKET, ttl_s=subjects.EMBEDDINGS_TTL_S),
        is_gone=workers.is_gone,
        is_cancelled=cancellations.is_cancelled,
    )
    subscription = await bus.subscribe(subjects.CANCEL, CancelRequest, on_cancel)
    try:
        async with kept_running(index.run, "embedding index"):
            yield index
    finally:
        await subscription.close()


def _ingest(
    settings: GatewaySettings,
    model: ServedModel,
    me: WorkerRef,
    fetcher: MediaFetcher,
    pool: Executor,
) -> Ingest:
    media = settings.media
    limits = MediaLimits(
        PictureLimits(media.max_picture_bytes, media.max_picture_pixels),
        VideoLimits(
            max_bytes=media.max_video_bytes,
            max_duration_s=media.max_video_duration_s,
            max_frames=media.max_video_frames,
            max_pixels=media.max_video_frame_pixels,
        ),
        media.max_audio_bytes,
    )
    return Ingest(
        model,
        me,
        settings.admission,
        max_media={
            MediaKind.IMAGE: media.max_pictures,
            MediaKind.VIDEO: media.max_videos,
            MediaKind.AUDIO: media.max_audio_clips,
        },
        loader=MediaLoader(model.spec, limits, fetcher, pool),
        pool=pool,
    )


def _fetch_policy(settings: GatewaySettings) -> FetchPolicy:
    media = settings.media
    return FetchPolicy(
        allowed_hosts=media.allowed_hosts,
        max_bytes=max(media.max_picture_bytes, media.max_video_bytes, media.max_audio_bytes),
        timeout_s=media.fetch_timeout_s,
    )


def _watch(metrics: GatewayMetrics, admission: Admission, streams: Streams) -> None:
    metrics.watch("num_requests_running", "Requests at work", lambda: admission.num_in_flight)
    metrics.watch("held_bytes", "Bytes of bodies and pictures", lambda: admission.held_bytes)
    metrics.watch(
        "stray_events", "Events of requests that were over", lambda: streams.num_stray_events
    )


@asynccontextmanager
async def _liveness(bus: Bus, me: WorkerRef, streams: Streams) -> AsyncIterator[Liveness]:
    liveness = Liveness(bus, me, lambda: streams.live_ids)
    try:
        async with kept_running(liveness.run, "requests alive"):
            yield liveness
    finally:
        await liveness.close()


@contextlib.contextmanager
def _threads(num_threads: int) -> Iterator[Executor]:
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="ingest")
    try:
        yield pool
    finally:
        # Not waiting: a picture that is being decoded must not hold up the stop.
        pool.shutdown(wait=False, cancel_futures=True)
