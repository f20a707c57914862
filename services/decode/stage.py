"""The decode stage: takes `DecodeTask`s, gives tokens until each answer is complete.

A task is admitted when there are blocks for its longest possible answer and landing memory for its
KV; the KV is pulled from the prefill worker, moved into the blocks, and the lease released. From
then on the sequence takes part in every step. The task is acknowledged when its answer is
complete: if this process dies, the redelivered task finds its KV gone and the gateway, which knows
every token that reached the client, has the request computed again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence as Sequences

import torch

from services.decode.executor import DecodeExecutor
from services.decode.scheduler import DecodeScheduler
from services.decode.sequence import Sequence
from shared.bus.base import WorkQueue
from shared.cache.block_pool import BlockHandle
from shared.cache.geometry import KvGeometry
from shared.errors import FailureKind, Outcome, RequestFailed, TransferError
from shared.messages.control import Role
from shared.messages.descriptor import WorkerRef
from shared.messages.events import Event, TokenEvent
from shared.messages.work import DecodeTask
from shared.model.grammar import Grammars, GrammarState
from shared.model.sampling_row import Sampled, SamplingState
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
        self._guard = StepGuard(Role.DECODE.value)
        self._work = Signal()
        self._room = Signal()

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
                await intake.run(stop, self._worker.drain_s)
                steps.cancel()

    async def step(self) -> None:
        """Compute one token of every running sequence and send them."""
        batch = await self._work.until(self._scheduler.next_batch)
        try:
            with self._metrics.step_s.time():
                tokens = await self._worker.compute(self._executor.run, batch)
            self._guard.succeeded()
            self._metrics.batch_sequences.observe(len(batch))
            self._metrics.generation_tokens.inc(len(batch))
            events = self._apply(batch, tokens)
        except Exception as error:
            failure = self._guard.failed(error)
            for sequence in batch:
                self._end(sequence, failure)
            self._guard.check()
            return
        finally:
            self._scheduler.end_step()
            self._room.notify()
        await self._worker.events.publish(events)

    async def _steps(self) -> None:
        while True:
            await self.step()

    def _apply(
        self, batch: Sequences[Sequence], tokens: Sequences[Sampled | None]
    ) -> list[tuple[WorkerRef, Event]]:
        """Take in a step's tokens; sequences that were retired meanwhile say nothing."""
        events: list[tuple[WorkerRef, Event]] = []
        for sequence, token in zip(batch, tokens, strict=True):
            if sequence.retired:
                continue
            if token is None:
                self._end(sequence, not_a_number(Role.DECODE.value))
                continue
            told = sequence.append(token)
            events += [(sequence.gateway, event) for event in told]
            if not isinstance(told[-1], TokenEvent):
                self._end(sequence)
        return events

    def _end(self, sequence: Sequence, error: Exception | None = None) -> None:
        self._scheduler.retire(sequence)
        complete = self._complete[sequence]
        if complete.done():  # its task was cancelled during the step
            return
        if error is None:
            complete.set_result(None)
        else:
            complete.set_exception(error)

    async def _serve(self, task: DecodeTask, ticket: Ticket) -> None:
        grammar = await self._grammars.open_for(task.request, task.last_token_id)
        longest = task.request.max_context_tokens
        blocks = await self._room.until(lambda: self._scheduler.try_admit(longest))
        try:
            await self._land(task, blocks, ticket)
        except BaseException:
            self._scheduler.withdraw(blocks)
            self._room.notify()
            raise
        await self._generate(_sequence(task, blocks, grammar))

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

    async def _generate(self, sequence: Sequence) -> None:
        """Take part in every step until the answer is complete, failed or unwanted."""
        complete = asyncio.get_running_loop().create_future()
        self._complete[sequence] = complete
        self._scheduler.start(sequence)
        self._work.notify()
        try:
            with tracing.span(names.DECODE):
                await complete
        finally:
            self._scheduler.retire(sequence)
            del self._complete[sequence]
            self._room.notify()


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
    )
