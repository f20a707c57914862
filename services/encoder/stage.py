"""The encode stage: takes `EncodeTask`s, announces embeddings.

A task's picture is fetched from the media store, preprocessed in a thread, batched with others by
patch budget, embedded, kept in a bounded pool, exposed under a lease and announced in the
`embeddings` bucket. The lease is held by the request; when it is released or lapses the embedding
stays in the pool as a cache entry until its memory is needed. The same picture asked for twice is
embedded once. If this process dies before it announced, the task returns to the queue.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from services.encoder.executor import EncodeExecutor
from services.encoder.scheduler import EncodeScheduler
from shared.bus import subjects
from shared.bus.base import KeyValue, ObjectStore, WorkQueue
from shared.cache.embedding_pool import EmbeddingPool
from shared.clock import wall
from shared.errors import FailureKind, ObjectMissing, RequestFailed
from shared.messages.codec import encode
from shared.messages.control import Role
from shared.messages.descriptor import MediaItem
from shared.messages.refs import EmbeddingRef, embedding_lease_id
from shared.messages.work import EncodeTask
from shared.model.towers.pixels import Pixels
from shared.runtime.intake import Intake, Ticket
from shared.runtime.lifecycle import Stop
from shared.runtime.scope import unwrapped
from shared.runtime.signal import Signal
from shared.runtime.step_guard import StepGuard
from shared.runtime.worker import Worker
from shared.telemetry import names, tracing
from shared.telemetry.metrics import EncoderMetrics
from shared.transport.base import Segment
from shared.transport.tensors import byte_view

Preprocess = Callable[[bytes], Pixels]


@dataclass(eq=False)
class EncodeJob:
    """One picture on its way through the tower."""

    pixels: Pixels
    began: Callable[[], None]
    done: asyncio.Future[torch.Tensor] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    started_s: float = 0.0
    ended_s: float = 0.0

    @property
    def num_patches(self) -> int:
        """Rows that the tower sees."""
        return self.pixels.num_patches


@dataclass(frozen=True)
class EncodeStores:
    """The bus objects that the stage reads from and writes to."""

    tasks: WorkQueue[EncodeTask]
    media: ObjectStore
    announcements: KeyValue


class EncodeStage:
    """Decide, execute, publish: `step` embeds one batch."""

    def __init__(
        self,
        worker: Worker,
        stores: EncodeStores,
        *,
        executor: EncodeExecutor,
        preprocess: Preprocess,
        scheduler: EncodeScheduler[EncodeJob],
        pool_bytes: int,
        bytes_per_token: int,
        max_held: int,
    ) -> None:
        self._metrics = EncoderMetrics.create(worker.registry)
        self._worker = worker
        self._stores = stores
        self._executor = executor
        self._preprocess = preprocess
        self._scheduler = scheduler
        self._bytes_per_token = bytes_per_token
        self._max_held = max_held
        self._pool: EmbeddingPool[torch.Tensor] = EmbeddingPool(pool_bytes)
        self._metrics.pool_usage.set_function(lambda: self._pool.used_bytes / pool_bytes)
        self._pending: set[str] = set()  # content keys that are being embedded right now
        self._guard = StepGuard(Role.ENCODE.value)
        self._work = Signal()
        self._room = Signal()

    async def run(self, stop: Stop) -> None:
        """Serve until a stop is requested, then finish what was taken."""
        intake = Intake(
            self._stores.tasks,
            self._serve,
            stage=Role.ENCODE.value,
            has_room=lambda: intake.num_held < self._max_held,
            room=self._room,
            events=self._worker.events,
            cancellations=self._worker.cancellations,
            metrics=self._worker.metrics,
            heartbeat_s=self._worker.heartbeat_s,
        )
        with unwrapped():
            async with asyncio.TaskGroup() as scope:
                steps = scope.create_task(self._steps())
                await intake.run(stop, self._worker.drain_s)
                steps.cancel()

    async def step(self) -> None:
        """Embed the next batch and hand each picture to the request that waits for it."""
        batch = await self._work.until(self._scheduler.next_batch)
        started_s = wall()
        for job in batch:
            job.began()
        try:
            embeddings = await self._worker.compute(self._executor.run, [j.pixels for j in batch])
        except Exception as error:
            failure = self._guard.failed(error)
            for job in batch:
                if not job.done.done():
                    job.done.set_exception(failure)
            self._guard.check()
            return
        self._guard.succeeded()
        ended_s = wall()
        self._metrics.forward_s.observe(ended_s - started_s)
        self._metrics.batch_items.observe(len(batch))
        for job, embedding in zip(batch, embeddings, strict=True):
            job.started_s, job.ended_s = started_s, ended_s
            if not job.done.done():
                job.done.set_result(embedding)

    async def _steps(self) -> None:
        while True:
            await self.step()

    async def _serve(self, task: EncodeTask, ticket: Ticket) -> None:
        key = task.item.content_key
        if self._num_bytes(task.item) > self._pool.max_bytes:
            raise RequestFailed(
                FailureKind.BAD_REQUEST,
                f"a picture of {task.item.num_tokens} tokens takes {self._num_bytes(task.item)} "
                f"bytes, an encoder's pool holds {self._pool.max_bytes}",
            )
        await self._ensure(task.item, ticket)
        embedding = self._pool.pin(key)
        ref = self._expose(task, embedding)
        await self._stores.announcements.put(key, encode(ref))

    async def _ensure(self, item: MediaItem, ticket: Ticket) -> None:
        """Return when the pool holds the item's embedding, which this or another task computed."""
        key = item.content_key
        if key in self._pool:
            self._metrics.cache_hits.inc()
        while self._pool.get(key) is None:
            if key in self._pending:
                ticket.admit()
                await self._room.until(lambda: key not in self._pending)
                continue
            self._pending.add(key)
            try:
                await self._compute(item, ticket)
            finally:
                self._pending.discard(key)
                self._room.notify()

    async def _compute(self, item: MediaItem, ticket: Ticket) -> None:
        key, num_bytes = item.content_key, self._num_bytes(item)
        await self._room.until(lambda: self._pool.try_reserve(key, num_bytes))
        ticket.admit()
        try:
            embedding = await self._embed(await self._fetch(item), ticket)
            self._pool.fill(key, embedding)
        except BaseException:
            self._pool.discard(key)
            raise

    async def _fetch(self, item: MediaItem) -> Pixels:
        try:
            with tracing.span(names.MEDIA_FETCH):
                data = await self._stores.media.get(item.sha256)
        except ObjectMissing as error:
            raise RequestFailed(
                FailureKind.MEDIA_MISSING,
                f"picture {item.sha256[:12]} is no longer in the media store",
            ) from error
        with (
            tracing.span(names.PREPROCESS, num_bytes=len(data)),
            self._metrics.preprocess_s.time(),
        ):
            pixels = await asyncio.to_thread(self._preprocess, data)
        if pixels.grid_thw != item.grid_thw:
            raise RequestFailed(
                FailureKind.INTERNAL,
                f"picture {item.sha256[:12]} has a patch grid of {pixels.grid_thw}, "
                f"the gateway computed {item.grid_thw}",
            )
        return pixels

    async def _embed(self, pixels: Pixels, ticket: Ticket) -> torch.Tensor:
        job = EncodeJob(pixels, ticket.began)
        self._scheduler.add(job)
        self._work.notify()
        try:
            embedding = await job.done
        finally:
            self._scheduler.cancel(job)
        tracing.record_span(
            names.ENCODE,
            job.started_s,
            job.ended_s,
            num_patches=job.num_patches,
        )
        return embedding

    def _expose(self, task: EncodeTask, embedding: torch.Tensor) -> EmbeddingRef:
        key = task.item.content_key

        def released() -> None:
            self._pool.unpin(key)
            self._room.notify()

        tensor = self._worker.transport.expose(
            embedding_lease_id(task.request_id, task.attempt, uuid.uuid4().hex[:12]),
            [Segment(embedding.nbytes, lambda: byte_view(embedding), is_instant=True)],
            holders=[task.request_id],
            on_release=released,
        )
        num_tokens, hidden_size = embedding.shape
        return EmbeddingRef(
            content_key=key, num_tokens=num_tokens, hidden_size=hidden_size, tensor=tensor
        )

    def _num_bytes(self, item: MediaItem) -> int:
        return item.num_tokens * self._bytes_per_token


async def open_stores(worker: Worker, *, media_ttl_s: float, media_bytes: int) -> EncodeStores:
    """The stage's bus objects, made if they do not exist."""
    return EncodeStores(
        tasks=await worker.bus.work_queue(subjects.work(Role.ENCODE, worker.model), EncodeTask),
        media=await worker.bus.object_store(
            subjects.MEDIA_BUCKET, ttl_s=media_ttl_s, max_bytes=media_bytes
        ),
        announcements=await worker.bus.key_value(
            subjects.EMBEDDINGS_BUCKET, ttl_s=subjects.EMBEDDINGS_TTL_S
        ),
    )
