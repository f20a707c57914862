"""The prefill stage: takes `PrefillTask`s, gives first tokens and `DecodeTask`s.

A task reserves landing memory for all its embeddings at once, pulls them as they are announced, is
computed together with others, sends its first token straight to the gateway, and exposes its KV
under a lease for the decoder. The blocks stay its own until the decoder has pulled them: full
decoders therefore stop prefill, and prefill stops taking tasks. The prefill task is acknowledged
only when the decode task is queued, so a killed worker's prompts are computed again elsewhere.
"""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass, field

import torch

from services.prefill.embeddings import EmbeddingIndex, EmbeddingReceiver
from services.prefill.executor import FirstToken, PrefillExecutor, PreparedPrompt, PromptInput
from services.prefill.scheduler import PrefillScheduler
from shared.bus.base import WorkQueue
from shared.cache.block_pool import BlockHandle
from shared.cache.geometry import KvGeometry
from shared.clock import wall
from shared.errors import QueueFull
from shared.messages.control import Role
from shared.messages.descriptor import RequestDescriptor
from shared.messages.events import Event, FinishedEvent, FinishReason, TokenEvent
from shared.messages.refs import KvRef
from shared.messages.work import DecodeTask, PrefillTask
from shared.model.grammar import Grammars
from shared.runtime.intake import Intake, Ticket
from shared.runtime.lifecycle import Stop
from shared.runtime.scope import unwrapped
from shared.runtime.signal import Signal
from shared.runtime.step_guard import StepGuard, not_a_number
from shared.runtime.worker import Worker
from shared.telemetry import names, tracing
from shared.telemetry.metrics import PrefillMetrics
from shared.transport.base import Segment
from shared.transport.landing import Landing
from shared.transport.tensors import byte_view

QUEUE_FULL_RETRY_S = 0.05
INSTANT_GATHER_BYTES = 1024 * 1024
"""KV up to this size is gathered on the event loop: copying it takes less than a thread switch."""


@dataclass(eq=False)
class PrefillJob:
    """One prompt on its way through the model.

    `blocks` are set by the scheduler. They are freed by whoever sees the job end: the step if the
    job was dropped while it was being computed, otherwise the task that owns it or its lease.
    """

    request: RequestDescriptor
    prompt: PreparedPrompt
    embeddings: torch.Tensor | None
    blocks: BlockHandle | None = None
    in_step: bool = False
    dropped: bool = False
    started_s: float = 0.0
    ended_s: float = 0.0
    done: asyncio.Future[FirstToken] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    @property
    def num_tokens(self) -> int:
        """Tokens to compute."""
        return self.request.num_tokens

    @property
    def block_ids(self) -> tuple[int, ...]:
        """The blocks that the step writes."""
        return self.blocks.block_ids if self.blocks else ()

    def drop(self) -> None:
        """Nobody wants the result: free the blocks, now or when the running step is over."""
        self.dropped = True
        if self.blocks is not None and not self.in_step:
            self.blocks.free()

    def end_step(self) -> None:
        """The step's writes are done."""
        self.in_step = False
        if self.dropped:
            self.drop()


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
        geometry: KvGeometry,
        max_held: int,
        grammars: Grammars,
    ) -> None:
        self._worker = worker
        self._links = links
        self._executor = executor
        self._scheduler = scheduler
        self._landing = landing
        self._geometry = geometry
        self._max_held = max_held
        self._grammars = grammars
        self._metrics = links.metrics
        self._guard = StepGuard(Role.PREFILL.value)
        self._work = Signal()
        self._room = Signal()

    async def run(self, stop: Stop) -> None:
        """Serve until a stop is requested, then finish what was taken."""
        intake = Intake(
            self._links.tasks,
            self._serve,
            stage=Role.PREFILL.value,
            has_room=lambda: intake.num_held < self._max_held,
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
        batch = await self._work.until(self._scheduler.next_batch)
        started_s = wall()
        for job in batch:
            job.in_step, job.started_s = True, started_s
        prompts = [PromptInput(job.prompt, job.embeddings, job.block_ids) for job in batch]
        try:
            tokens = await self._worker.compute(self._executor.run, prompts)
        except Exception as error:
            failure = self._guard.failed(error)
            for job in batch:
                if not job.done.done():
                    job.done.set_exception(failure)
            self._guard.check()
            return
        finally:
            for job in batch:
                job.ended_s = wall()
                job.end_step()
            self._work.notify()
        self._guard.succeeded()
        self._metrics.forward_s.observe(wall() - started_s)
        self._metrics.batch_tokens.observe(sum(job.num_tokens for job in batch))
        self._metrics.prompt_tokens.inc(sum(job.num_tokens for job in batch))
        # A job whose task was cancelled during the step has a cancelled future.
        wanted = [(j, token) for j, token in zip(batch, tokens, strict=True) if not j.done.done()]
        for job, token in wanted:
            if token is None:
                job.done.set_exception(not_a_number(Role.PREFILL.value))
            else:
                job.done.set_result(token)
        await self._worker.events.publish(
            (job.request.gateway, event)
            for job, token in wanted
            if token is not None
            for event in _events(job.request, token)
        )

    async def _steps(self) -> None:
        while True:
            await self.step()

    async def _serve(self, task: PrefillTask, ticket: Ticket) -> None:
        request = task.request
        self._scheduler.check_fits(request.num_tokens)
        # A prompt that contradicts itself is refused here, before it shares a step with others.
        prompt = self._executor.prepare(request, await self._grammars.open_for(request))
        async with self._landing.reserved(
            request.request_id, self._links.receiver.num_bytes(request)
        ):
            ticket.admit()
            embeddings = await self._links.receiver.receive(request)
            job = PrefillJob(request, prompt, embeddings)
            first = await self._computed(job)
            job.embeddings = None
        assert job.blocks is not None
        if _is_finished(request, first):
            job.drop()
            self._work.notify()
            return
        await self._hand_over(request, job.blocks, first)

    async def _computed(self, job: PrefillJob) -> FirstToken:
        """Wait until the job went through a step. Whatever goes wrong, its blocks are freed."""
        try:
            self._scheduler.add(job)
            self._work.notify()
            first = await job.done
        except BaseException:
            self._scheduler.cancel(job)
            job.drop()
            self._work.notify()
            raise
        tracing.record_span(
            names.PREFILL,
            job.started_s,
            job.ended_s,
            num_tokens=job.num_tokens,
        )
        return first

    async def _hand_over(
        self, request: RequestDescriptor, blocks: BlockHandle, first: FirstToken
    ) -> None:
        """Expose the KV and queue the decode task; from here on the lease owns the blocks."""
        kv = self._expose(request, blocks, first)
        task = DecodeTask(
            request=request,
            kv=kv,
            last_token_id=first.token_id,
            next_index=request.next_index + 1,
        )
        try:
            await self._queue_decode(task)
        except BaseException:
            self._worker.transport.revoke(kv.tensor.lease_id)
            raise

    async def _queue_decode(self, task: DecodeTask) -> None:
        request = task.request
        message_id = f"{request.request_id}:{request.attempt}:decode"
        headers = tracing.inject()
        while True:
            try:
                await self._links.decode_tasks.put(task, message_id=message_id, headers=headers)
                return
            except QueueFull:
                # Decoders are behind. The pinned blocks hold new prompts back meanwhile; the
                # request's deadline bounds the wait.
                await asyncio.sleep(QUEUE_FULL_RETRY_S)

    def _expose(self, request: RequestDescriptor, blocks: BlockHandle, first: FirstToken) -> KvRef:
        def released() -> None:
            blocks.free()
            self._work.notify()

        block_ids, num_tokens = blocks.block_ids, request.num_tokens
        layers = slice(0, self._geometry.num_layers)
        num_bytes = num_tokens * self._geometry.bytes_per_token
        segment = Segment(
            num_bytes,
            lambda: byte_view(self._executor.gather(block_ids, num_tokens, layers)),
            is_instant=num_bytes <= INSTANT_GATHER_BYTES,
        )
        tensor = self._worker.transport.expose(
            f"kv.{request.request_id}.{request.attempt}.{uuid.uuid4().hex[:8]}",
            [segment],
            holders=[request.request_id],
            on_release=released,
        )
        kv_len = (num_tokens,) * self._geometry.num_layers
        return KvRef(tensor=tensor, kv_len=kv_len, next_pos=first.next_pos)


def _is_finished(request: RequestDescriptor, first: FirstToken) -> bool:
    return (
        first.token_id in request.sampling.stop_token_ids
        or request.next_index + 1 >= request.sampling.max_tokens
    )


def _events(request: RequestDescriptor, first: FirstToken) -> list[Event]:
    """What the gateway hears of a first token; a stop token ends the answer and is not part of
    it."""
    index = request.next_index
    key = {"request_id": request.request_id, "attempt": request.attempt}
    if first.token_id in request.sampling.stop_token_ids:
        return [FinishedEvent(**key, num_tokens=index, reason=FinishReason.STOP)]
    events: list[Event] = [
        TokenEvent(**key, index=index, token_id=first.token_id, logprobs=first.logprobs)
    ]
    if _is_finished(request, first):
        events.append(FinishedEvent(**key, num_tokens=index + 1, reason=FinishReason.LENGTH))
    return events
