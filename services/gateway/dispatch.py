"""Puts a request on the bus: picture files first, then all of its tasks at once.

Encode and prefill tasks are published together: prefill waits for the embeddings it needs while
the encoders work. A request without pictures never touches encode, nor does one whose embeddings
some worker has, or makes for another request. Every other picture is a task of its own, so all
encoders take part. Message ids name request, attempt and task, so a task that is published twice is
queued once.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from dataclasses import dataclass

from shared.bus import subjects
from shared.bus.base import Bus, ObjectStore, WorkQueue
from shared.clock import Clock, monotonic
from shared.messages.control import Role
from shared.messages.descriptor import RequestDescriptor
from shared.messages.work import EncodeTask, PrefillTask
from shared.runtime.embedding_index import EmbeddingIndex
from shared.telemetry import names, tracing

MAX_REMEMBERED = 16_384


@dataclass(frozen=True)
class WorkQueues:
    """The queues that the gateway feeds."""

    encode: WorkQueue[EncodeTask]
    prefill: WorkQueue[PrefillTask]


async def open_queues(bus: Bus, model: str) -> WorkQueues:
    """The work queues of one model, made if they do not exist."""
    return WorkQueues(
        encode=await bus.work_queue(subjects.work(Role.ENCODE, model), EncodeTask),
        prefill=await bus.work_queue(subjects.work(Role.PREFILL, model), PrefillTask),
    )


class Dispatcher:
    """Publishes attempts. `store_ttl_s` is how long the media store keeps what it was given.

    `count` hears of every picture whether its embedding is `cached`, `joined` or `queued`.
    """

    def __init__(
        self,
        queues: WorkQueues,
        media: ObjectStore,
        index: EmbeddingIndex,
        *,
        store_ttl_s: float,
        count: Callable[[str], None] = lambda outcome: None,
        clock: Clock = monotonic,
    ) -> None:
        self._queues = queues
        self._media = media
        self._index = index
        self._count = count
        # Twice as often as needed: the store must outlive the request, not just its beginning.
        self._trust_s = store_ttl_s / 2
        self._clock = clock
        self._stored_s: OrderedDict[str, float] = OrderedDict()

    async def submit(self, request: RequestDescriptor, media: Mapping[str, bytes]) -> None:
        """Queue one attempt. Raises `QueueFull` or another `BusError`; then cancel the attempt."""
        if media:
            with tracing.span(names.MEDIA_STORE, num_objects=len(media)):
                await _all(self._store(name, data) for name, data in media.items())
        with tracing.span(names.DISPATCH, attempt=request.attempt):
            headers = tracing.inject()
            tasks = self._encode_tasks(request)
            await _all(self._index.put(task.claim()) for task in tasks)
            await _all(self._puts(request, tasks, headers))

    def forget(self, media: Mapping[str, bytes]) -> None:
        """The store turned out not to have these files: store them again next time."""
        for name in media:
            self._stored_s.pop(name, None)

    async def _store(self, name: str, data: bytes) -> None:
        stored_s = self._stored_s.get(name)
        if stored_s is not None and self._clock() - stored_s < self._trust_s:
            return
        await self._media.put(name, data)
        self._stored_s[name] = self._clock()
        self._stored_s.move_to_end(name)
        if len(self._stored_s) > MAX_REMEMBERED:
            self._stored_s.popitem(last=False)

    def _encode_tasks(self, request: RequestDescriptor) -> list[EncodeTask]:
        """One for each picture that nobody has and nobody makes; the same one twice is one."""
        tasks = []
        for key, item in {item.content_key: item for item in request.media}.items():
            claim = self._index.claim_of(key)
            if self._index.find(key) is not None:
                self._count("cached")
            elif claim is not None and claim.request_id != request.request_id:
                self._count("joined")
            else:  # also where an earlier attempt of this very request claimed it
                self._count("queued")
                task = EncodeTask.of(request, item)
                self._index.note(task.claim())
                tasks.append(task)
        return tasks

    def _puts(
        self, request: RequestDescriptor, tasks: Iterable[EncodeTask], headers: Mapping[str, str]
    ) -> Iterator[Coroutine[None, None, None]]:
        prefix = f"{request.request_id}:{request.attempt}"
        for task in tasks:
            yield self._queues.encode.put(
                task, message_id=f"{prefix}:encode:{task.item.content_key}", headers=headers
            )
        yield self._queues.prefill.put(
            PrefillTask(request=request), message_id=f"{prefix}:prefill", headers=headers
        )


async def _all(work: Iterator[Coroutine[None, None, None]]) -> None:
    """Run all to their end, then raise the first error: none is left running unseen."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
