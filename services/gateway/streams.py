"""Events to the answers they belong to.

In: event batches from all workers, and dead letters. Out: for each live request a stream of
advances. The pure core runs as events arrive, so what waits for a slow client is text, never a
growing list of events.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace

from services.gateway.answer import Advance, Answer
from shared.bus.dead_letters import DeadLetter
from shared.clock import Clock, monotonic
from shared.errors import FailureKind
from shared.messages.descriptor import WorkerRef
from shared.messages.events import Event, EventBatch, FailedEvent, TokenEvent

OnAdvance = Callable[[Advance, float], None]


class Stream:
    """One request's answer, and what of it the client has not seen yet."""

    def __init__(self, answer: Answer, on_advance: OnAdvance) -> None:
        self.answer = answer
        self.worker: WorkerRef | None = None
        self.last_event_s: float | None = None
        self.num_attempt_tokens = 0
        self._on_advance = on_advance
        self._unseen: Advance | None = None
        self._arrived = asyncio.Event()

    def take(self, worker: WorkerRef | None, event: Event, now_s: float) -> None:
        """An event came, from this worker where it is known."""
        if event.attempt != self.answer.attempt:
            return
        self.worker, self.last_event_s = worker or self.worker, now_s
        self.num_attempt_tokens += isinstance(event, TokenEvent)
        advance = self.answer.accept(event, now_s)
        self._on_advance(advance, now_s)
        self._unseen = advance if self._unseen is None else self._unseen + advance
        self._arrived.set()

    async def next(self, timeout_s: float) -> Advance | None:
        """Everything since the last call, or None if nothing came in time."""
        if not self._arrived.is_set():
            # Once per token: a timer is all that is needed of `asyncio.timeout`.
            waking = asyncio.get_running_loop().call_later(max(timeout_s, 0.0), self._arrived.set)
            try:
                await self._arrived.wait()
            finally:
                waking.cancel()
        advance, self._unseen = self._unseen, None
        self._arrived.clear()
        return advance

    def restart(self) -> None:
        """A new attempt begins: its workers are not known yet, and the old one's failure is
        void."""
        self.answer.restart()
        self.worker = self.last_event_s = None
        self.num_attempt_tokens = 0
        if self._unseen is not None:
            self._unseen = replace(self._unseen, failure=None)


class Streams:
    """All live requests of this gateway."""

    def __init__(self, clock: Clock = monotonic) -> None:
        self._clock = clock
        self._streams: dict[str, Stream] = {}
        self.num_stray_events = 0

    def open(self, request_id: str, answer: Answer, on_advance: OnAdvance) -> Stream:
        """From now on events of this request are taken."""
        stream = Stream(answer, on_advance)
        self._streams[request_id] = stream
        return stream

    def close(self, request_id: str) -> None:
        """The request is over. Idempotent."""
        self._streams.pop(request_id, None)

    @property
    def live_ids(self) -> tuple[str, ...]:
        return tuple(self._streams)

    async def on_batch(self, batch: EventBatch, headers: Mapping[str, str]) -> None:
        """The handler of this gateway's event subject."""
        now_s = self._clock()
        for event in batch.events:
            stream = self._streams.get(event.request_id)
            if stream is None:  # late events of a request that is over
                self.num_stray_events += 1
            else:
                stream.take(batch.worker, event, now_s)

    async def on_dead_letter(self, letter: DeadLetter) -> None:
        """A task was given up after several workers tried it: its attempt fails, for good."""
        origin = letter.task.origin
        stream = self._streams.get(origin.request_id)
        if stream is None:  # over, or another gateway's
            return
        failure = FailedEvent(
            request_id=origin.request_id,
            attempt=origin.attempt,
            kind=FailureKind.INTERNAL,
            message=f"a task was given up after {letter.num_delivered} deliveries: {letter.reason}",
            retryable=False,
        )
        stream.take(None, failure, self._clock())
