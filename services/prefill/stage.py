"""The prefill stage: takes `PrefillTask`s, gives first tokens and `DecodeTask`s.

A task reserves landing memory for all its embeddings at once, pulls them as they are announced (but
not those whose keys and values are cached), is computed together with others, sends its first token
straight to the gateway, and exposes its KV under a lease for the decoder, who is told when the
prompt's first step begins and pulls what is finished while the rest is computed (see
`PiecePlan`). A step stops between two layers when a more urgent prompt comes, and goes on
afterwards. The blocks stay prefill's until the decoder has pulled them: full decoders therefore
stop prefill, and prefill stops taking tasks. The prefill task is acknowledged only when the first
token is sent and the decode task is queued, so a killed worker's prompts are computed again
elsewhere. Where this process decodes as well, its own decode stage comes first (see
`HandOver`); the prefill task then stands for the whole answer.

What decoders add to a sequence is not cached: it lies in their processes, and the answer comes back
here as part of the next turn's prompt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from services.prefill.announcement import Announcement
from services.prefill.batch import PrefillBatch
from services.prefill.embeddings import EmbeddingReceiver
from services.prefill.executor import FirstToken, PrefillExecutor
from services.prefill.job import PrefillJob, num_covered_pictures
from services.prefill.outlet import Outlet
from services.prefill.pieces import PiecePlan
from services.prefill.scheduler import PrefillScheduler
from shared.bus.base import WorkQueue
from shared.clock import wall
from shared.messages.control import Role
from shared.messages.descriptor import RequestDescriptor
from shared.messages.events import Event, FinishedEvent, FinishReason, TokenEvent
from shared.messages.work import DecodeTask, PrefillTask
from shared.model.grammar import Grammars
from shared.runtime.embedding_index import EmbeddingIndex
from shared.runtime.hand_over import HandOver
from shared.runtime.intake import Intake, Ticket
from shared.runtime.lifecycle import Stop
from shared.runtime.scope import unwrapped
from shared.runtime.signal import Signal
from shared.runtime.step_guard import StepGuard, not_a_number
from shared.runtime.worker import Worker
from shared.telemetry import names, tracing
from shared.telemetry.metrics import PrefillMetrics
from shared.transport.landing import Landing


@dataclass(frozen=True)
class PrefillLinks:
    """The stage's queues and its way to embeddings."""

    tasks: WorkQueue[PrefillTask]
    decode_tasks: WorkQueue[DecodeTask]
    index: EmbeddingIndex
    receiver: EmbeddingReceiver
    metrics: PrefillMetrics


class PrefillStage:
    """Decide, execute, publish: `step` computes one batch."""

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
        self._metrics = links.metrics
        self._guard = StepGuard(Role.PREFILL.value)
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
        self._tells_layers = plan.transfer == "layer-wise"
        self._pause_requested = False  # read by the compute thread between layers

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
                    scope.create_task(self._steps()),
                    scope.create_task(self._links.index.run()),
                ]
                await intake.run(stop, self._worker.drain_s)
                for task in background:
                    task.cancel()

    async def step(self) -> None:
        """Compute the next batch and send the first tokens."""
        await self._run(await self._work.until(self._scheduler.next_batch))

    async def _run(self, batch: PrefillBatch[PrefillJob]) -> None:
        for job in batch.uncovered:
            job.resolve(None)
        if not batch.slices:
            return
        started_s = wall()
        for each in batch:
            each.job.started_s = each.job.started_s or started_s
            each.job.began()
            each.job.progress.computed(each.start)
            each.job.begun.set()
        try:
            tokens = await self._forward(batch)
        except BaseException as error:
            self._scheduler.abort(batch)
            self._wake()
            if not isinstance(error, Exception):
                raise
            failure = self._guard.failed(error)
            for each in batch:
                each.job.fail(failure)
            self._guard.check()
            return
        if tokens is None:
            self._scheduler.abort(batch)
            self._wake()
            return
        self._guard.succeeded()
        await self._end(batch, tokens)

    async def _forward(self, batch: PrefillBatch[PrefillJob]) -> list[FirstToken | None] | None:
        """Compute a batch, and between its layers whatever is more urgent; None if nobody wants it
        any more."""
        step = self._executor.begin([each.job.input(each.start, each.stop) for each in batch])
        loop = asyncio.get_running_loop()

        def on_layer(num_layers: int) -> None:
            loop.call_soon_threadsafe(self._on_layer, batch, num_layers)

        is_heard = self._tells_layers and any(each.job.travels_early for each in batch)
        busy_s = 0.0
        while not self._scheduler.is_abandoned(batch):
            self._pause_requested = False
            started_s = wall()
            tokens = await self._worker.compute(
                step.advance,
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
        self._wake()
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
            for event in _events(job, token)
        )

    def _wake(self) -> None:
        """Something changed for the scheduler: look again, in the middle of a step if need be."""
        self._work.notify()
        if self._scheduler.should_preempt():
            self._pause_requested = True

    async def _steps(self) -> None:
        while True:
            await self.step()

    async def _serve(self, task: PrefillTask, ticket: Ticket) -> None:
        request = task.request
        # Where the answer is generated in the same blocks, there must be room for all of it.
        longest = request.max_context_tokens if self._decodes_too else request.num_tokens
        self._scheduler.check_fits(longest)
        job, first, announcement = await self._prefilled(request, ticket)
        assert job.blocks is not None
        if _is_finished(request, first):
            if announcement is not None:
                announcement.withdraw()
            job.blocks.free()
            self._wake()
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
                job.embeddings = await self._links.receiver.receive(
                    request, num_skipped=num_skipped
                )
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
            self._scheduler.add(job)
            self._wake()
            first = await job.done
        except BaseException:
            self._scheduler.cancel(job)
            if announcement is not None:
                announcement.withdraw()
            self._wake()
            raise
        if first is None and announcement is not None:
            announcement.withdraw()
        if first is not None:
            tracing.record_span(
                names.PREFILL,
                job.started_s,
                job.ended_s,
                num_tokens=job.num_tokens,
                num_cached_tokens=job.num_cached_tokens,
            )
        return first, announcement


def _is_finished(request: RequestDescriptor, first: FirstToken) -> bool:
    return (
        first.token_id in request.sampling.stop_token_ids
        or request.next_index + 1 >= request.sampling.max_tokens
    )


def _events(job: PrefillJob, first: FirstToken) -> list[Event]:
    """What the gateway hears of a first token; a stop token ends the answer and is not part of
    it."""
    request = job.request
    index = request.next_index
    key = {"request_id": request.request_id, "attempt": request.attempt}
    if first.token_id in request.sampling.stop_token_ids:
        return [FinishedEvent(**key, num_tokens=index, reason=FinishReason.STOP)]
    token = TokenEvent(
        **key,
        index=index,
        token_id=first.token_id,
        num_cached_tokens=job.num_cached_tokens,
        logprobs=first.logprobs,
    )
    events: list[Event] = [token]
    if _is_finished(request, first):
        events.append(FinishedEvent(**key, num_tokens=index + 1, reason=FinishReason.LENGTH))
    return events
