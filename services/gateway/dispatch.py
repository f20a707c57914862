"""Puts a request on the bus: picture files first, then all of its tasks at once.

Encode and prefill tasks are published together: prefill waits for the embeddings it needs while
the encoders work. A request without pictures never touches encode, nor does one whose embeddings
some worker has, or makes for another request. Every other picture is a task of its own, or several
where it can be divided and encoders would be idle (see `division`), so all encoders take part.
Message ids name request, attempt and task, so a task that is published twice is queued once.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from services.gateway.division import num_free, numbers_of_parts
from shared.bus import subjects
from shared.bus.base import Bus, ObjectStore, WorkQueue
from shared.clock import Clock, monotonic
from shared.messages.control import Role
from shared.messages.descriptor import MediaItem, MediaPart, RequestDescriptor, WorkerRef
from shared.messages.refs import EmbeddingDivision
from shared.messages.work import EncodeTask, PrefillTask
from shared.runtime.embedding_index import EmbeddingIndex
from shared.runtime.media_parts import known_parts, parts_of
from shared.telemetry import names, tracing

MAX_REMEMBERED = 16_384
_WORST_FIRST = ("queued", "joined", "cached")


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

    `count` hears of every picture whether its embedding is `cached`, `joined` or `queued`, the last
    as `divided` where several encoders share it. `encoders` are those that live; no part of a
    picture has fewer than `min_part_patches`, 0: none is divided.
    """

    def __init__(
        self,
        queues: WorkQueues,
        media: ObjectStore,
        index: EmbeddingIndex,
        *,
        store_ttl_s: float,
        count: Callable[[str], None] = lambda outcome: None,
        encoders: Callable[[], Collection[WorkerRef]] = tuple,
        min_part_patches: int = 0,
        clock: Clock = monotonic,
    ) -> None:
        self._queues = queues
        self._media = media
        self._index = index
        self._count = count
        self._encoders = encoders
        self._min_part_patches = min_part_patches
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
            # Divisions first: whoever sees the claim of a part must be able to know what it is of.
            await _all(self._index.put(each) for each in _divisions(tasks))
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
        """What nobody has and nobody makes; the same picture twice is one. Parts come last: an
        encoder that gets a whole picture first has the longer work under way."""
        tasks: list[EncodeTask] = []
        missing = []
        for item in {item.content_key: item for item in request.media}.values():
            parts = known_parts(self._index, item)
            states = [self._state(request, part.content_key) for part in parts]
            if not parts or set(states) == {"queued"}:
                state = self._state(request, item.content_key)
                if state == "queued":
                    missing.append(item)
                    continue
            else:  # some of its parts are there or on their way, so the others are asked for
                state = min(states, key=_WORST_FIRST.index)
                wanted = [
                    p for p, of_part in zip(parts, states, strict=True) if of_part == "queued"
                ]
                tasks += self._noted(request, item, wanted)
            self._count(state)
        return sorted(
            [*tasks, *self._tasks_of(request, missing)], key=lambda task: task.part is not None
        )

    def _state(self, request: RequestDescriptor, key: str) -> str:
        """`cached`, `joined`, or `queued`: it has to be."""
        if self._index.find(key) is not None:
            return "cached"
        claim = self._index.claim_of(key)
        if claim is not None and claim.request_id != request.request_id:
            return "joined"
        return "queued"  # also where an earlier attempt of this very request claimed it

    def _tasks_of(
        self, request: RequestDescriptor, items: Sequence[MediaItem]
    ) -> Iterator[EncodeTask]:
        """One task for each item, or one for each of its parts."""
        if not items:
            return
        numbers = numbers_of_parts(
            items,
            num_encoders=num_free(self._encoders(), self._index.claims()),
            min_part_patches=self._min_part_patches,
        )
        for item, num_parts in zip(items, numbers, strict=True):
            if num_parts == 1:
                self._count("queued")
                yield from self._noted(request, item, [None])
                continue
            self._count("divided")
            key = item.content_key
            self._index.note(EmbeddingDivision(content_key=key, num_parts=num_parts))
            yield from self._noted(request, item, parts_of(item, num_parts))

    def _noted(
        self, request: RequestDescriptor, item: MediaItem, parts: Iterable[MediaPart | None]
    ) -> Iterator[EncodeTask]:
        """The tasks, which this process counts as queued from now on."""
        for part in parts:
            task = EncodeTask.of(request, item, part)
            self._index.note(task.claim())
            yield task

    def _puts(
        self, request: RequestDescriptor, tasks: Iterable[EncodeTask], headers: Mapping[str, str]
    ) -> Iterator[Coroutine[None, None, None]]:
        prefix = f"{request.request_id}:{request.attempt}"
        for task in tasks:
            yield self._queues.encode.put(
                task, message_id=f"{prefix}:encode:{task.content_key}", headers=headers
            )
        yield self._queues.prefill.put(
            PrefillTask(request=request), message_id=f"{prefix}:prefill", headers=headers
        )


def _divisions(tasks: Iterable[EncodeTask]) -> Iterator[EmbeddingDivision]:
    """How the items of these tasks are divided, each once."""
    numbers = {task.item.content_key: task.part.count for task in tasks if task.part is not None}
    for key, num_parts in numbers.items():
        yield EmbeddingDivision(content_key=key, num_parts=num_parts)


async def _all(work: Iterator[Coroutine[None, None, None]]) -> None:
    """Run all to their end, then raise the first error: none is left running unseen."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
