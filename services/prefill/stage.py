"""The prefill stage: takes `PrefillTask`s, gives first tokens and `DecodeTask`s.

A task reserves landing memory for all its embeddings at once, pulls them as they are announced (but
not those whose keys and values are cached), is computed together with others, as far as its
embeddings have landed (see `early`), sends its first token straight to the gateway, and exposes its
KV under a lease for the decoder, who is told when the first step behind the last embedding begins
and pulls what is finished while the rest is computed (see `PiecePlan`). The blocks stay prefill's
until the decoder has pulled them: full decoders therefore stop prefill, and prefill stops taking
tasks. The prefill task is acknowledged only when the first token is sent and the decode task is
queued, so a killed worker's prompts are computed again elsewhere. Where this process decodes as
well, its own decode stage comes first (see `HandOver`); the prefill task then stands for the whole
answer.

What decoders add to a sequence is not cached: it lies in their processes, and the answer comes back
here as part of the next turn's prompt.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from services.prefill.announcement import Announcement
from services.prefill.arrival import Arrival
from services.prefill.embeddings import EmbeddingReceiver
from services.prefill.executor import FirstToken, PrefillExecutor
from services.prefill.first_token import is_finished
from services.prefill.job import PrefillJob, num_covered_pictures
from services.prefill.outlet import Outlet
from services.prefill.pieces import PiecePlan
from services.prefill.scheduler import PrefillScheduler
from services.prefill.steps import PrefillSteps
from shared.bus.base import WorkQueue
from shared.messages.control import Role
from shared.messages.descriptor import RequestDescriptor
from shared.messages.work import DecodeTask, PrefillTask
from shared.model.grammar import Grammars
from shared.runtime.embedding_index import EmbeddingIndex
from shared.runtime.hand_over import HandOver
from shared.runtime.intake import Intake, Ticket
from shared.runtime.lifecycle import Stop
from shared.runtime.scope import unwrapped
from shared.runtime.signal import Signal
from shared.runtime.worker import Worker
from shared.telemetry import names, tracing
from shared.telemetry.metrics import PrefillMetrics
from shared.transport.landing import Landing

EARLY_AFTER_S = 0.01
"""Embeddings that are on their way already are not worth a step of their own before them."""


@dataclass(frozen=True)
class PrefillLinks:
    """The stage's queues and its way to embeddings."""

    tasks: WorkQueue[PrefillTask]
    decode_tasks: WorkQueue[DecodeTask]
    index: EmbeddingIndex
    receiver: EmbeddingReceiver
    metrics: PrefillMetrics


class PrefillStage:
    """One coroutine for each task, and the steps that they wait for."""

    def __init__(
        self,
        worker: Worker,
        links: PrefillLinks,
        *,
        executor: PrefillExecutor,
        scheduler: PrefillScheduler[PrefillJob],
        landing: Landing,
        plan: PiecePlan,
        max_held: int,
        grammars: Grammars,
        hand_over: HandOver | None = None,
    ) -> None:
        self._worker = worker
        self._links = links
        self._executor = executor
        self._scheduler = scheduler
        self._landing = landing
        self._max_held = max_held
        self._grammars = grammars
        self._decodes_too = hand_over is not None
        self._work = hand_over.room if hand_over is not None else Signal()
        self._room = Signal()
        self._outlet = Outlet(
            worker,
            links.decode_tasks,
            executor=executor,
            grammars=grammars,
            plan=plan,
            work=self._work,
            room=self._room,
            here=hand_over,
        )
        self._steps = PrefillSteps(
            worker,
            executor=executor,
            scheduler=scheduler,
            metrics=links.metrics,
            work=self._work,
            tells_layers=plan.transfer == "layer-wise",
        )

    async def run(self, stop: Stop) -> None:
        """Serve until a stop is requested, then finish what was taken."""
        intake = Intake(
            self._links.tasks,
            self._serve,
            stage=Role.PREFILL.value,
            has_room=lambda: intake.num_held - self._outlet.num_answers < self._max_held,
            room=self._room,
            events=self._worker.events,
            cancellations=self._worker.cancellations,
            metrics=self._worker.metrics,
            heartbeat_s=self._worker.heartbeat_s,
        )
        with unwrapped():
            async with asyncio.TaskGroup() as scope:
                background = [
                    scope.create_task(self._steps.run()),
                    scope.create_task(self._links.index.run()),
                ]
                await intake.run(stop, self._worker.drain_s)
                for task in background:
                    task.cancel()

    async def _serve(self, task: PrefillTask, ticket: Ticket) -> None:
        request = task.request
        # Where the answer is generated in the same blocks, there must be room for all of it.
        longest = request.max_context_tokens if self._decodes_too else request.num_tokens
        self._scheduler.check_fits(longest)
        job, first, announcement = await self._prefilled(request, ticket)
        assert job.blocks is not None
        if is_finished(request, first):
            if announcement is not None:
                announcement.withdraw()
            job.blocks.free()
            self._steps.wake()
            return
        await self._outlet.send(job, first, announcement)

    async def _prefilled(
        self, request: RequestDescriptor, ticket: Ticket
    ) -> tuple[PrefillJob, FirstToken, Announcement | None]:
        # A prompt that contradicts itself is refused here, before it shares a step with others.
        prompt = self._executor.prepare(request, await self._grammars.open_for(request))
        keys: tuple[bytes, ...] = ()
        num_skipped = 0
        if prefix := self._scheduler.prefix:
            keys = prefix.keys_of(prompt.token_ids.tolist(), request.media)
            num_skipped = num_covered_pictures(
                request, prefix.num_cached_tokens(keys, request.num_tokens)
            )
        first, announcement = None, None
        while first is None:
            job = PrefillJob(request, prompt, keys, num_skipped, began=ticket.began)
            num_bytes = self._links.receiver.num_bytes(request, num_skipped=num_skipped)
            async with self._landing.reserved(request.request_id, num_bytes):
                ticket.admit()
                first, announcement = await self._computed(job)
                job.embeddings = None
            num_skipped = 0  # only a job that skips pictures can come back without a token
        return job, first, announcement

    async def _computed(self, job: PrefillJob) -> tuple[FirstToken | None, Announcement | None]:
        """Wait until the job went through its steps, and who was told of it meanwhile.

        Whatever goes wrong, its blocks are freed.
        """
        announcement = self._outlet.announce(job)
        job.travels_early = announcement is not None
        try:
            first = await self._first_token(job)
        except BaseException:
            self._scheduler.cancel(job)
            if announcement is not None:
                announcement.withdraw()
            self._steps.wake()
            raise
        if first is None and announcement is not None:
            announcement.withdraw()
        if first is not None:
            _record_spans(job)
        return first, announcement

    async def _first_token(self, job: PrefillJob) -> FirstToken | None:
        arrival = Arrival(self._links.receiver, job, self._steps.wake)
        patience_s = EARLY_AFTER_S if self._scheduler.computes_early else None
        async with arrival.under_way(patience_s):
            self._scheduler.add(job)
            self._steps.wake()
            return await job.done


def _record_spans(job: PrefillJob) -> None:
    for early in job.early:
        tracing.record_span(
            names.PREFILL_EARLY, early.started_s, early.ended_s, num_tokens=early.num_tokens
        )
    tracing.record_span(
        names.PREFILL,
        job.started_s,
        job.ended_s,
        num_tokens=job.num_tokens,
        num_cached_tokens=job.num_cached_tokens,
    )
