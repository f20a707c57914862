"""The decode stage: takes `DecodeTask`s, gives tokens until each answer is complete.

A task is admitted when the scheduler has blocks for it and there is landing memory for its KV; the
KV is pulled from the prefill worker, moved into the blocks, and the lease released. From then on
the sequence takes part in every step. A sequence that was prefilled in this very process comes
without a task (see `HandOver`) or under a lease of its own; its blocks are taken over as they are.
The task is acknowledged when its answer is complete: if this process dies, the redelivered task
finds its KV gone and the gateway, which knows every token that reached the client, has the request
computed again. The same happens to a sequence that gave its blocks to others and found no room in
host memory. When the process changes its role, answers that would take too long go on elsewhere,
with their KV.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence as Sequences

import torch

from services.decode.departure import Departure, leaves
from services.decode.executor import DecodeExecutor, StepResult
from services.decode.plan import StepPlan
from services.decode.scheduler import DecodeScheduler
from services.decode.sequence import Sequence
from shared.bus.base import WorkQueue
from shared.cache.block_pool import BlockHandle
from shared.cache.geometry import KvGeometry
from shared.clock import monotonic
from shared.errors import BusError, FailureKind, Outcome, RequestFailed, TransferError
from shared.messages.control import Role
from shared.messages.descriptor import RequestDescriptor, WorkerRef
from shared.messages.events import Event, TokenEvent
from shared.messages.work import DecodeTask
from shared.model.grammar import Grammars, GrammarState
from shared.model.sampling_row import SamplingState
from shared.runtime.hand_over import Answer, HandOver, Prefilled
from shared.runtime.intake import Intake, Ticket
from shared.runtime.lifecycle import Stop
from shared.runtime.scope import unwrapped
from shared.runtime.signal import Signal
from shared.runtime.step_guard import StepGuard, not_a_number
from shared.runtime.worker import Worker
from shared.telemetry import names, tracing
from shared.telemetry.metrics import DecodeMetrics
from shared.transport.landing import Landing
from shared.transport.tensors import byte_view

logger = logging.getLogger(__name__)


class DecodeStage:
    """Decide, execute, publish: `step` gives every running sequence one more token."""

    def __init__(
        self,
        worker: Worker,
        tasks: WorkQueue[DecodeTask],
        *,
        executor: DecodeExecutor,
        scheduler: DecodeScheduler,
        landing: Landing,
        geometry: KvGeometry,
        pull_timeout_s: float,
        grammars: Grammars,
        departure: Departure,
        hand_over: HandOver | None = None,
    ) -> None:
        self._worker = worker
        self._tasks = tasks
        self._executor = executor
        self._scheduler = scheduler
        self._landing = landing
        self._geometry = geometry
        self._pull_timeout_s = pull_timeout_s
        self._grammars = grammars
        self._metrics = DecodeMetrics.create(worker.registry)
        self._complete: dict[Sequence, asyncio.Future[None]] = {}
        self._requests: dict[Sequence, RequestDescriptor] = {}
        self._departure = departure
        self._leave_by_s: float | None = None
        self._step_s = 0.0
        self._sending: asyncio.Task[None] | None = None
        self._guard = StepGuard(Role.DECODE.value)
        self._work = Signal()
        self._hand_over = hand_over
        self._room = hand_over.room if hand_over is not None else Signal()

    async def run(self, stop: Stop) -> None:
        """Serve until a stop is requested, then finish the running answers."""
        intake = Intake(
            self._tasks,
            self._serve,
            stage=Role.DECODE.value,
            has_room=lambda: self._scheduler.num_free_slots > 0,
            room=self._room,
            events=self._worker.events,
            cancellations=self._worker.cancellations,
            metrics=self._worker.metrics,
            heartbeat_s=self._worker.heartbeat_s,
        )
        with unwrapped():
            async with asyncio.TaskGroup() as scope:
                steps = scope.create_task(self._steps())
                handed_over = scope.create_task(self._take_from_here(stop))
                leaving = scope.create_task(self._prepare_to_leave(stop))
                await intake.run(stop, self._worker.drain_s)
                await handed_over
                steps.cancel()
                leaving.cancel()

    async def step(self) -> None:
        """Compute the next tokens of every running sequence; they are sent during the next step."""
        plan = await self._work.until(self._scheduler.next_step)
        for sequence in plan.returned:
            self._end(sequence, _preempted())
        started_s = monotonic()
        try:
            with self._metrics.step_s.time():
                result = await self._worker.compute(self._executor.step, plan)
            self._step_s = monotonic() - started_s
            self._guard.succeeded()
            self._measure(plan, result)
            events, ended = _taken_in(plan.batch, result)
        except Exception as error:
            failure = self._guard.failed(error)
            for sequence in plan.touched:
                self._end(sequence, failure)
            self._guard.check()
            return
        finally:
            self._scheduler.end_step()
            self._room.notify()
        await self._send(events)
        for sequence, problem in ended:
            self._end(sequence, problem)

    async def _steps(self) -> None:
        try:
            while True:
                await self._depart()
                await self.step()
        finally:
            await self._sent()

    async def _prepare_to_leave(self, stop: Stop) -> None:
        """From a change of the process' role on, each step may send answers away."""
        await stop.wait()
        if stop.finish_s is not None:
            self._leave_by_s = monotonic() + stop.finish_s

    async def _depart(self) -> None:
        """Send away the answers that would not be complete in time."""
        if self._leave_by_s is None:
            return
        for sequence, request in list(self._requests.items()):
            left_s = self._leave_by_s - monotonic()
            if sequence.retired or not leaves(sequence.num_remaining, self._step_s, left_s):
                continue
            await self._sent()  # the next decoder's tokens come after ours
            try:
                if not len(sequence.blocks):  # it waits in host memory
                    raise _preempted()
                await self._departure.send(request, sequence)
            except (BusError, RequestFailed) as error:
                logger.warning("request %s goes on by recovery: %s", request.request_id, error)
                self._end(sequence, _preempted())
            else:
                self._end(sequence)

    async def _take_from_here(self, stop: Stop) -> None:
        """Take what this process prefills until the stop; return when its answers are complete.

        They belong to prefill's tasks, whose time to drain is bounded.
        """
        if self._hand_over is None:
            return
        hand_over = self._hand_over
        hand_over.open(self._accept)
        try:
            await stop.wait()
        finally:
            hand_over.close()
        await hand_over.room.until(lambda: hand_over.num_answers == 0)

    def _accept(self, prefilled: Prefilled) -> Answer | None:
        request = prefilled.request
        blocks = self._scheduler.try_admit(
            request.num_tokens, request.max_context_tokens, shared=prefilled.block_ids
        )
        if blocks is None:
            return None
        return self._generate(_handed_over(prefilled, blocks), request)

    async def _send(self, events: list[tuple[WorkerRef, Event]]) -> None:
        """Begin to send a step's events; whatever runs next on the loop comes after them."""
        await self._sent()
        if events:
            self._sending = asyncio.create_task(self._worker.events.publish(events))

    async def _sent(self) -> None:
        """Wait until the events of the last step are on their way."""
        sending, self._sending = self._sending, None
        if sending is not None:
            await sending

    def _measure(self, plan: StepPlan, result: StepResult) -> None:
        metrics = self._metrics
        if plan.batch:
            metrics.batch_sequences.observe(len(plan.batch))
        metrics.generation_tokens.inc(sum(map(len, result.tokens)))
        if plan.saves:
            metrics.preemptions.labels("swap").inc(len(plan.saves))
        if plan.returned:
            metrics.preemptions.labels("recompute").inc(len(plan.returned))
        if not any(result.num_drafted):
            return
        metrics.drafts.inc(sum(map(bool, result.num_drafted)))
        metrics.draft_tokens.inc(sum(result.num_drafted))
        for tokens in result.tokens:
            metrics.accepted_tokens.inc(len(tokens) - 1)
            for position in range(1, len(tokens)):
                metrics.accepted_at.labels(str(position)).inc()

    def _end(self, sequence: Sequence, error: Exception | None = None) -> None:
        self._scheduler.retire(sequence)
        complete = self._complete.get(sequence)
        if complete is None or complete.done():  # its task was cancelled during the step
            return
        if error is None:
            complete.set_result(None)
        else:
            complete.set_exception(error)

    async def _serve(self, task: DecodeTask, ticket: Ticket) -> None:
        grammar = await self._grammars.open_for(task.request, task.last_token_id)
        num_tokens, longest = task.kv.kv_len[0], task.request.max_context_tokens
        blocks = await self._room.until(
            lambda: self._scheduler.try_admit(num_tokens, longest, shared=self._own_blocks(task))
        )
        try:
            if self._own_blocks(task):
                ticket.admit()
                await self._worker.transport.release(task.kv.tensor, task.request.request_id)
            else:
                await self._land(task, blocks, ticket)
        except BaseException:
            self._scheduler.withdraw(blocks)
            self._room.notify()
            self._work.notify()  # a sequence may have waited for these blocks
            raise
        ticket.began()
        await self._generate(_sequence(task, blocks, grammar), task.request)

    def _own_blocks(self, task: DecodeTask) -> tuple[int, ...]:
        """The blocks that this process has leased to the task; empty if others hold its KV."""
        tensor = task.kv.tensor
        if self._hand_over is None or tensor.owner != self._worker.me:
            return ()
        return self._hand_over.leased(tensor.lease_id)

    async def _land(self, task: DecodeTask, blocks: BlockHandle, ticket: Ticket) -> None:
        """Pull the KV into landing memory and move it into the sequence's blocks."""
        num_layers, num_tokens = len(task.kv.kv_len), task.kv.kv_len[0]
        num_bytes = task.kv.tensor.num_bytes
        self._check_shape(task, num_layers, num_tokens)
        async with self._landing.reserved(task.request.request_id, num_bytes):
            ticket.admit()
            values = self._executor.empty_landing(num_layers, num_tokens)
            await self._pull(task, values)
            await self._worker.compute(
                self._executor.scatter, blocks.block_ids, values, slice(0, num_layers)
            )

    def _check_shape(self, task: DecodeTask, num_layers: int, num_tokens: int) -> None:
        expected = (self._geometry.num_layers, num_tokens * self._geometry.bytes_per_token)
        if (num_layers, task.kv.tensor.num_bytes) != expected:
            raise RequestFailed(
                FailureKind.INTERNAL,
                f"KV of {num_layers} layers in {task.kv.tensor.num_bytes} bytes arrived, "
                f"{expected[0]} layers in {expected[1]} bytes were expected",
            )

    async def _pull(self, task: DecodeTask, values: torch.Tensor) -> None:
        ref = task.kv.tensor
        try:
            with (
                tracing.span(names.TRANSFER_KV, num_bytes=ref.num_bytes),
                self._metrics.kv_transfer_s.time(),
            ):
                await self._worker.transport.pull(
                    ref, 0, byte_view(values), timeout_s=self._pull_timeout_s
                )
        except TransferError as error:
            kind = (
                FailureKind.INTERNAL
                if error.outcome is Outcome.INCOMPATIBLE
                else FailureKind.WORKER_LOST
            )
            raise RequestFailed(
                kind, f"KV was not received: {error}", retryable=kind is FailureKind.WORKER_LOST
            ) from error
        await self._worker.transport.release(ref, task.request.request_id)

    async def _generate(self, sequence: Sequence, request: RequestDescriptor) -> None:
        """Take part in every step until the answer is complete, failed or unwanted."""
        complete = asyncio.get_running_loop().create_future()
        self._complete[sequence] = complete
        self._requests[sequence] = request
        self._scheduler.start(sequence)
        self._work.notify()
        try:
            with tracing.span(names.DECODE):
                await complete
        finally:
            self._scheduler.retire(sequence)
            del self._complete[sequence], self._requests[sequence]
            self._room.notify()
            self._work.notify()


def _taken_in(
    batch: Sequences[Sequence], result: StepResult
) -> tuple[list[tuple[WorkerRef, Event]], list[tuple[Sequence, RequestFailed | None]]]:
    """Take in a step's tokens: what the gateways are told, and the sequences that ended and why.

    Sequences that were retired meanwhile say nothing.
    """
    events: list[tuple[WorkerRef, Event]] = []
    ended: list[tuple[Sequence, RequestFailed | None]] = []
    for sequence, tokens in zip(batch, result.tokens, strict=True):
        if sequence.retired:
            continue
        for token in tokens:
            if token is None:
                ended.append((sequence, not_a_number(Role.DECODE.value)))
                break
            told = sequence.append(token)
            events += [(sequence.gateway, event) for event in told]
            if not isinstance(told[-1], TokenEvent):
                ended.append((sequence, None))
                break
    return events, ended


def _preempted() -> RequestFailed:
    return RequestFailed(
        FailureKind.PREEMPTED,
        "the answer gave its KV blocks to others and goes on from its tokens",
        retryable=True,
    )


def _sequence(task: DecodeTask, blocks: BlockHandle, grammar: GrammarState | None) -> Sequence:
    return Sequence(
        request_id=task.request.request_id,
        attempt=task.request.attempt,
        gateway=task.request.gateway,
        sampling=task.request.sampling,
        state=SamplingState.of(task.request, grammar, task.last_token_id),
        blocks=blocks,
        kv_len=task.kv.kv_len[0],
        next_pos=task.kv.next_pos,
        last_token_id=task.last_token_id,
        next_index=task.next_index,
        history=[
            *task.request.prompt_token_ids,
            *task.request.emitted_token_ids,
            task.last_token_id,
        ],
    )


def _handed_over(prefilled: Prefilled, blocks: BlockHandle) -> Sequence:
    request = prefilled.request
    return Sequence(
        request_id=request.request_id,
        attempt=request.attempt,
        gateway=request.gateway,
        sampling=request.sampling,
        state=SamplingState.of(request, prefilled.grammar, prefilled.last_token_id),
        blocks=blocks,
        kv_len=request.num_tokens,
        next_pos=prefilled.next_pos,
        last_token_id=prefilled.last_token_id,
        next_index=request.next_index + 1,
        history=[
            *request.prompt_token_ids,
            *request.emitted_token_ids,
            prefilled.last_token_id,
        ],
    )
