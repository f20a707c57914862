"""One request from its dispatch to its end, through as many attempts as it takes.

In: a prepared request. Out: advances, and either an end or one `RequestFailed`. Decisions come from
`recovery`; here they are carried out. Whoever starts a run must close it: a run that is closed
before its end tells the workers to stop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from services.gateway.answer import Advance, Answer
from services.gateway.dispatch import Dispatcher
from services.gateway.ingest import Prepared
from services.gateway.liveness import Liveness
from services.gateway.recovery import (
    GiveUp,
    Observation,
    RecoveryPolicy,
    Resubmit,
    Trouble,
    Unserved,
    decide,
)
from services.gateway.streams import OnAdvance, Stream, Streams
from services.gateway.workers import Workers
from shared.clock import Clock, monotonic
from shared.errors import BusError, FailureKind, RequestFailed
from shared.messages.control import Role
from shared.messages.events import FailedEvent
from shared.telemetry import names, tracing
from shared.text.tokenizer import TextTokenizer

# Registrations change without an event of the request's own, so they are looked at this often.
POLL_S = 0.5
BUS_RETRY_S = 0.5

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Runner:
    """What all runs share."""

    dispatcher: Dispatcher
    streams: Streams
    liveness: Liveness
    workers: Workers
    tokenizer: TextTokenizer
    policy: RecoveryPolicy
    clock: Clock = monotonic

    async def start(self, prepared: Prepared, on_advance: OnAdvance) -> Run:
        """Dispatch the first attempt. Raises `BusError`; then nothing is left behind."""
        run = Run(self, prepared, on_advance)
        try:
            await run.submit()
        except BaseException:
            run.close()
            raise
        return run


class Run:
    """One request at work."""

    def __init__(self, runner: Runner, prepared: Prepared, on_advance: OnAdvance) -> None:
        self._runner = runner
        self._prepared = prepared
        request = prepared.descriptor
        self._deadline_s = runner.clock() + request.deadline_unix_s - request.created_unix_s
        self.answer = Answer(
            request.request_id,
            runner.tokenizer,
            prepared.stops,
            request.sampling.max_tokens,
            request.sampling.min_tokens,
        )
        self._stream: Stream = runner.streams.open(request.request_id, self.answer, on_advance)
        self._attempt_started_s = runner.clock()
        self._unserved: Unserved | None = None
        self._closed = False
        self.troubles: list[Trouble] = []

    async def submit(self) -> None:
        """Queue the current attempt, which carries on after the tokens known so far."""
        self._attempt_started_s = self._runner.clock()
        request = self._prepared.descriptor.model_copy(
            update={
                "attempt": self.answer.attempt,
                "emitted_token_ids": tuple(self.answer.token_ids),
            }
        )
        await self._runner.dispatcher.submit(request, self._prepared.media)

    async def advances(self) -> AsyncGenerator[Advance, None]:
        """What comes, until the end. Raises one `RequestFailed` (or a `BusError`) in its place."""
        clock = self._runner.clock
        look_at_s = clock() + POLL_S
        while True:
            advance = await self._stream.next(look_at_s - clock())
            if advance is not None and (advance.num_new_tokens or advance.end):
                yield advance
                if advance.end:
                    return
                if self._goes_well(advance) and clock() < look_at_s:
                    continue
            wait_s = await self._supervise(advance.failure if advance else None)
            look_at_s = clock() + wait_s

    def close(self) -> None:
        """The request is over, one way or another. Idempotent."""
        if self._closed:
            return
        self._closed = True
        request_id = self._prepared.descriptor.request_id
        self._runner.streams.close(request_id)
        # Also after a good end: it releases at once whatever the request still holds anywhere.
        self._runner.liveness.cancel(request_id, self.answer.attempt)

    def _goes_well(self, advance: Advance) -> bool:
        """Whether the tokens that came bring nothing nearer that the policy would act on: from an
        attempt's third one on, each only puts off the moment of silence."""
        is_whole = advance.failure is None and self.answer.gap_since_s is None
        return is_whole and self._stream.num_attempt_tokens > 2

    async def _supervise(self, failure: FailedEvent | None) -> float:
        """Do what the policy says; returns how long to wait for the next event."""
        now_s = self._runner.clock()
        match decide(self._runner.policy, self._observe(now_s, failure)):
            case GiveUp(kind, message):
                raise RequestFailed(kind, message)
            case Resubmit(trouble, _):
                await self._resubmit(trouble, failure)
                return POLL_S
            case wait:
                return min(POLL_S, wait.until_s - now_s)

    async def _resubmit(self, trouble: Trouble, failure: FailedEvent | None) -> None:
        self.troubles.append(trouble)
        self._runner.liveness.cancel(self._prepared.descriptor.request_id, self.answer.attempt)
        if failure is not None and failure.kind is FailureKind.MEDIA_MISSING:
            self._runner.dispatcher.forget(self._prepared.media)
        self._stream.restart()
        with tracing.span(names.RECOVERY, trouble=trouble.value):
            while True:
                try:
                    await self.submit()
                    return
                except BusError as error:
                    # Part of the answer may be out already: the request's deadline is the bound.
                    # Message ids name the attempt, so what did get through is not queued twice.
                    if self._runner.clock() + BUS_RETRY_S >= self._deadline_s:
                        raise
                    logger.warning("resubmission failed, trying again: %s", error)
                    await asyncio.sleep(BUS_RETRY_S)

    def _look_for_workers(self, now_s: float) -> Unserved | None:
        """The first stage that the attempt still needs and nobody fills, and since when."""
        needed = [Role.DECODE]
        if self._stream.last_event_s is None:
            needed = [Role.PREFILL, Role.DECODE]
            if self._prepared.descriptor.media:
                needed = [Role.ENCODE, *needed]
        missing = next((r for r in needed if not self._runner.workers.is_served(r)), None)
        if missing is None:
            self._unserved = None
        elif self._unserved is None:
            self._unserved = Unserved(missing.value, now_s)
        return self._unserved

    def _observe(self, now_s: float, failure: FailedEvent | None) -> Observation:
        worker = self._stream.worker
        lost = worker is not None and self._runner.workers.is_gone(worker)
        return Observation(
            now_s=now_s,
            deadline_s=self._deadline_s,
            attempt=self.answer.attempt,
            attempt_started_s=self._attempt_started_s,
            num_preemptions=self.troubles.count(Trouble.PREEMPTED),
            last_event_s=self._stream.last_event_s,
            num_attempt_tokens=self._stream.num_attempt_tokens,
            gap_since_s=self.answer.gap_since_s,
            lost_worker=worker.name if lost and worker is not None else None,
            unserved=self._look_for_workers(now_s),
            failure=failure,
        )
