"""Prefill's steps: decide, execute, publish, one batch after the other.

In: the jobs that the scheduler knows. Out: each job's first token, to the task that waits for it
and to the gateway; what decoders may hear of a job's progress. A step stops between two layers when
a more urgent prompt comes, and goes on afterwards. Knows nothing of queues, embeddings and leases.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from services.prefill.batch import PrefillBatch
from services.prefill.executor import FirstToken, PrefillExecutor
from services.prefill.first_token import events_of
from services.prefill.job import EarlySpan, PrefillJob
from services.prefill.scheduler import PrefillScheduler
from shared.clock import wall
from shared.messages.control import Role
from shared.runtime.signal import Signal
from shared.runtime.step_guard import StepGuard, not_a_number
from shared.runtime.worker import Worker
from shared.telemetry.metrics import PrefillMetrics


class PrefillSteps:
    """`step` computes one batch. With `tells_layers` decoders hear of finished layers."""

    def __init__(
        self,
        worker: Worker,
        *,
        executor: PrefillExecutor,
        scheduler: PrefillScheduler[PrefillJob],
        metrics: PrefillMetrics,
        work: Signal,
        tells_layers: bool,
    ) -> None:
        self._worker = worker
        self._executor = executor
        self._scheduler = scheduler
        self._metrics = metrics
        self._work = work
        self._tells_layers = tells_layers
        self._guard = StepGuard(Role.PREFILL.value)
        self._pause_requested = False  # read by the compute thread between layers

    async def run(self) -> None:
        """Compute whatever there is, until cancelled."""
        while True:
            await self.step()

    async def step(self) -> None:
        """Compute the next batch and send the first tokens."""
        await self._run(await self._work.until(self._scheduler.next_batch))

    def wake(self) -> None:
        """Something changed for the scheduler: look again, in the middle of a step if need be."""
        self._work.notify()
        if self._scheduler.should_preempt():
            self._pause_requested = True

    async def _run(self, batch: PrefillBatch[PrefillJob]) -> None:
        for job in batch.uncovered:
            job.resolve(None)
        if not batch.slices:
            return
        started_s = wall()
        if not batch.is_early:  # else nobody hears of it: it may be lost again
            for each in batch:
                each.job.begin(each.start, started_s)
        try:
            tokens = await self._forward(batch)
        except BaseException as error:
            self._scheduler.abort(batch)
            self.wake()
            if not isinstance(error, Exception):
                raise
            failure = self._guard.failed(error)
            for each in batch:
                each.job.fail(failure)
            self._guard.check()
            return
        if tokens is None:
            self._scheduler.abort(batch)
            self.wake()
            return
        self._guard.succeeded()
        if batch.is_early:
            self._end_early(batch, started_s)
        else:
            await self._end(batch, tokens)

    async def _forward(self, batch: PrefillBatch[PrefillJob]) -> list[FirstToken | None] | None:
        """Compute a batch, and between its layers whatever is more urgent; None if nobody wants it
        any more."""
        step = self._executor.begin([each.job.input(each.start, each.stop) for each in batch])
        loop = asyncio.get_running_loop()

        def on_layer(num_layers: int) -> None:
            loop.call_soon_threadsafe(self._on_layer, batch, num_layers)

        travels = not batch.is_early and any(each.job.travels_early for each in batch)
        is_heard = self._tells_layers and travels
        busy_s = 0.0
        while not self._scheduler.is_abandoned(batch):
            self._pause_requested = self._scheduler.should_preempt()
            async with self._worker.cores.turn() as turn:
                started_s = wall()
                tokens = await self._worker.compute(
                    turn.last(step.advance),
                    lambda: self._pause_requested,
                    on_layer if is_heard else None,
                )
                busy_s += wall() - started_s
            if tokens is not None:
                self._metrics.forward_s.observe(busy_s)
                return tokens
            while urgent := self._scheduler.next_batch():
                self._metrics.suspensions.inc()
                await self._run(urgent)
        return None

    @staticmethod
    def _on_layer(batch: PrefillBatch[PrefillJob], num_layers: int) -> None:
        """So many layers of a batch are computed."""
        for each in batch:
            each.job.progress.computing(each.stop, num_layers)

    def _end_early(self, batch: PrefillBatch[PrefillJob], started_s: float) -> None:
        """A batch is computed of which only later batches make anything."""
        ended_s = wall()
        for each in batch:
            each.job.early.append(EarlySpan(started_s, ended_s, each.stop - each.start))
        self._scheduler.end_step(batch)
        self.wake()
        self._metrics.batch_tokens.observe(batch.num_tokens)
        self._metrics.early_tokens.inc(batch.num_tokens)

    async def _end(
        self, batch: PrefillBatch[PrefillJob], tokens: Sequence[FirstToken | None]
    ) -> None:
        """A batch is computed: pass its results on."""
        ended_s = wall()
        for each in batch:
            each.job.ended_s = ended_s
            each.job.progress.computed(each.stop)
        self._scheduler.end_step(batch)
        complete = [
            (each.job, token) for each, token in zip(batch, tokens, strict=True) if each.is_last
        ]
        if any(token is None for _, token in complete) and self._scheduler.prefix is not None:
            # Its keys and values may be damaged, and what it shared with others as well.
            self._scheduler.prefix.clear()
        self.wake()
        self._metrics.batch_tokens.observe(batch.num_tokens)
        self._metrics.prompt_tokens.inc(sum(job.num_tokens for job, _ in complete))
        self._metrics.cached_tokens.inc(sum(job.num_cached_tokens for job, _ in complete))
        # A job whose task was cancelled during the step has a cancelled future.
        wanted = [(job, token) for job, token in complete if not job.done.done()]
        for job, token in wanted:
            if token is None:
                job.fail(not_a_number(Role.PREFILL.value))
            else:
                job.resolve(token)
        await self._worker.events.publish(
            (job.request.gateway, event)
            for job, token in wanted
            if token is not None
            for event in events_of(job, token)
        )
