"""The encode stage: takes `EncodeTask`s, announces embeddings.

A task's picture, or its part of one, is fetched from the media store, preprocessed in a bounded
pool of threads, batched with others by patch budget, embedded, and put on the shelf, which offers
it to all. The same picture asked for twice is embedded once, here and in the whole cluster: a task
whose embedding another worker has or makes ends at once. If this process dies before it announced,
the task returns to the queue.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from services.encoder.executor import EncodeExecutor
from services.encoder.job import EncodeJob, Preprocess
from services.encoder.scheduler import EncodeScheduler, take_delay_s
from services.encoder.shelf import Shelf
from shared.bus import subjects
from shared.bus.base import ObjectStore, WorkQueue
from shared.clock import wall
from shared.errors import FailureKind, ObjectMissing, RequestFailed
from shared.messages.control import Role
from shared.messages.descriptor import MediaPart, WorkerRef
from shared.messages.work import EncodeTask
from shared.model.towers.base import TowerInput
from shared.runtime.core_turns import Turn
from shared.runtime.directory import WorkerDirectory
from shared.runtime.embedding_index import EmbeddingIndex, open_index
from shared.runtime.intake import Intake, Ticket
from shared.runtime.lifecycle import Stop
from shared.runtime.pause import Pause
from shared.runtime.scope import unwrapped
from shared.runtime.signal import Signal
from shared.runtime.step_guard import StepGuard
from shared.runtime.worker import Worker
from shared.telemetry import names, tracing
from shared.telemetry.metrics import EncoderMetrics


@dataclass(frozen=True)
class EncodeStores:
    """The bus objects that the stage reads from and writes to."""

    tasks: WorkQueue[EncodeTask]
    media: ObjectStore
    index: EmbeddingIndex
    encoders: Callable[[], int]
    """How many encoders live."""
    encodes: Callable[[WorkerRef], bool]
    """Whether a worker takes pictures now: one that is leaving hands back what it claimed."""


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
        preprocess_threads: int,
    ) -> None:
        self._metrics = EncoderMetrics.create(worker.registry)
        self._worker = worker
        self._stores = stores
        self._executor = executor
        self._preprocess = preprocess
        self._scheduler = scheduler
        self._bytes_per_token = bytes_per_token
        self._max_held = max_held
        self._pending: set[str] = set()  # content keys that are being embedded right now
        self._guard = StepGuard(Role.ENCODE.value)
        self._work = Signal()
        self._room = Signal()
        self._shelf = Shelf(worker, stores.index, pool_bytes, self._room, encodes=stores.encodes)
        self._pool = self._shelf.pool
        self._metrics.pool_usage.set_function(lambda: self._pool.used_bytes / pool_bytes)
        self._threads = ThreadPoolExecutor(preprocess_threads, thread_name_prefix="preprocess")
        self._num_held = 0
        self.num_held_patches = 0
        self._pause = Pause(self._room)
        self._stop: Stop | None = None

    async def run(self, stop: Stop) -> None:
        """Serve until a stop is requested, then finish what was taken."""
        self._stop = stop
        intake = Intake(
            self._stores.tasks,
            self._serve,
            stage=Role.ENCODE.value,
            has_room=self._may_take,
            room=self._room,
            events=self._worker.events,
            cancellations=self._worker.cancellations,
            metrics=self._worker.metrics,
            heartbeat_s=self._worker.heartbeat_s,
        )
        try:
            with unwrapped():
                async with asyncio.TaskGroup() as scope:
                    background = [
                        scope.create_task(self._steps()),
                        scope.create_task(self._stores.index.run()),
                    ]
                    await intake.run(stop, self._worker.drain_s)
                    await self._end_local(stop)
                    for task in background:
                        task.cancel()
        finally:
            # Not waiting: a picture that is being decoded must not hold up the stop.
            self._threads.shutdown(wait=False, cancel_futures=True)

    async def step(self) -> None:
        """Embed the next batch and hand each picture to the request that waits for it."""
        await self._work.until(lambda: self._scheduler.num_waiting)
        async with self._worker.cores.turn() as turn:
            if batch := self._scheduler.next_batch():
                await self._compute_batch(batch, turn)

    async def _compute_batch(self, batch: list[EncodeJob], turn: Turn) -> None:
        started_s = wall()
        for job in batch:
            job.began()
        try:
            embeddings = await self._worker.compute(
                turn.last(self._executor.run), [job.pixels for job in batch]
            )
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
        self._metrics.encoded.inc(len(batch))
        for job, embedding in zip(batch, embeddings, strict=True):
            job.started_s, job.ended_s = started_s, ended_s
            if not job.done.done():
                job.done.set_result(embedding)

    async def _steps(self) -> None:
        while True:
            await self.step()

    def _may_take(self) -> bool:
        return self._num_held < self._max_held and not self._pause.is_on

    async def _serve(self, task: EncodeTask, ticket: Ticket) -> None:
        delay_s = take_delay_s(self._num_held + 1, self._stores.encoders())
        if delay_s:
            self._pause.begin(delay_s)
        await self._held(task, ticket)

    @property
    def is_open(self) -> bool:
        """Whether it takes work from others in its process."""
        return self._stop is not None and not self._stop.requested

    async def _end_local(self, stop: Stop) -> None:
        """What others in the process wait for still needs the tower, but not for ever."""
        limit_s = self._worker.drain_s if stop.finish_s is None else stop.finish_s
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self._room.until(lambda: self._num_held == 0)

    async def encode_now(self, task: EncodeTask) -> None:
        """Serve a prompt of this process past the queue, which may bring the same task later."""
        try:
            await self._held(task, Ticket())
        finally:
            self._room.notify()

    async def _held(self, task: EncodeTask, ticket: Ticket) -> None:
        self._num_held += 1
        self.num_held_patches += task.num_patches
        try:
            await self._announced(task, ticket)
        finally:
            self._num_held -= 1
            self.num_held_patches -= task.num_patches

    async def _announced(self, task: EncodeTask, ticket: Ticket) -> None:
        if self._num_bytes(task) > self._pool.max_bytes:
            raise RequestFailed(
                FailureKind.BAD_REQUEST,
                f"an embedding of {task.num_tokens} tokens takes {self._num_bytes(task)} "
                f"bytes, an encoder's pool holds {self._pool.max_bytes}",
            )
        if self._shelf.is_elsewhere(task):
            self._metrics.spared.inc()
            return
        await self._ensure(task, ticket)
        await self._shelf.announce(task)

    async def _ensure(self, task: EncodeTask, ticket: Ticket) -> None:
        """Return when the pool holds the item's embedding, which this or another task computed."""
        key = task.content_key
        if key in self._pool:
            self._metrics.cache_hits.inc()
        while self._pool.get(key) is None:
            if key in self._pending:
                ticket.admit()
                await self._room.until(lambda: key not in self._pending)
                continue
            self._pending.add(key)
            self._shelf.claim(task)
            try:
                await self._compute(task, ticket)
            finally:
                self._pending.discard(key)
                self._room.notify()

    async def _compute(self, task: EncodeTask, ticket: Ticket) -> None:
        key, num_bytes = task.content_key, self._num_bytes(task)
        await self._room.until(lambda: self._pool.try_reserve(key, num_bytes))
        ticket.admit()
        try:
            embedding = await self._embed(await self._fetch(task), ticket)
            self._pool.fill(key, embedding)
        except BaseException:
            self._pool.discard(key)
            raise

    async def _fetch(self, task: EncodeTask) -> TowerInput:
        item = task.item
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
            self._metrics.preprocess_queue.track_inprogress(),
        ):
            loop = asyncio.get_running_loop()
            pixels = await loop.run_in_executor(self._threads, self._preprocessed, data, task.part)
        # A part's rows were compared instead, and a video's part has a grid of its own.
        if task.part is None and pixels.grid_thw != item.grid_thw:
            raise RequestFailed(
                FailureKind.INTERNAL,
                f"picture {item.sha256[:12]} has a patch grid of {pixels.grid_thw}, "
                f"the gateway computed {item.grid_thw}",
            )
        return pixels

    async def _embed(self, pixels: TowerInput, ticket: Ticket) -> torch.Tensor:
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

    def _preprocessed(self, data: bytes, part: MediaPart | None) -> TowerInput:
        """In a thread of the pool; what is metered is the work without the wait for a thread."""
        with self._metrics.preprocess_s.time():
            return self._preprocess(data, part)

    def _num_bytes(self, task: EncodeTask) -> int:
        return task.num_tokens * self._bytes_per_token


async def open_stores(
    worker: Worker, *, media_ttl_s: float, media_bytes: int, registration_ttl_s: float
) -> EncodeStores:
    """The stage's bus objects, made if they do not exist."""
    directory = WorkerDirectory(worker.bus, ttl_s=registration_ttl_s, model=worker.model)
    return EncodeStores(
        tasks=await worker.bus.work_queue(subjects.work(Role.ENCODE, worker.model), EncodeTask),
        media=await worker.bus.object_store(
            subjects.MEDIA_BUCKET, ttl_s=media_ttl_s, max_bytes=media_bytes
        ),
        index=await open_index(worker.bus, directory, worker.cancellations),
        encoders=lambda: len(directory.live(Role.ENCODE)),
        encodes=lambda worker: any(
            each.worker == worker for each in directory.live(Role.ENCODE, ready_only=True)
        ),
    )
