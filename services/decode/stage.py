"""The decode stage: takes `DecodeTask`s, gives tokens until each answer is complete.

A task is admitted when the scheduler has blocks for it and there is landing memory for its KV; the
KV is pulled from the prefill worker, moved into the blocks, and the lease released (`KvInlet`),
often while the rest of its prompt is still being computed. From then on
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

from services.decode.departure import Departure, leaves
from services.decode.executor import DecodeExecutor
from services.decode.inlet import KvInlet, Withdrawn
from services.decode.outcome import measure, take_in
from services.decode.plan import StepPlan
from services.decode.scheduler import DecodeScheduler
from services.decode.sequence import Sequence
from shared.bus.base import WorkQueue
from shared.cache.block_pool import BlockHandle
from shared.cache.kv_cache import KvCache
from shared.clock import monotonic
from shared.errors import BusError, FailureKind, RequestFailed
from shared.messages.control import Role
from shared.messages.descriptor import RequestDescriptor, TokenId, WorkerRef
from shared.messages.events import Event
from shared.messages.work import DecodeTask
from shared.model.grammar import Grammars
from shared.runtime.core_turns import Turn
from shared.runtime.hand_over import Answer, HandOver, Prefilled
from shared.runtime.intake import Intake, Ticket
from shared.runtime.lifecycle import Stop
from shared.runtime.scope import unwrapped
from shared.runtime.signal import Signal
from shared.runtime.step_guard import StepGuard
from shared.runtime.worker import Worker
from shared.telemetry import names, tracing
from shared.telemetry.metrics import DecodeMetrics
from shared.transport.landing import Landing

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
        kv: KvCache,
        pull_timeout_s: float,
        grammars: Grammars,
        departure: Departure,
        hand_over: HandOver | None = None,
    ) -> None:
        self._worker = worker
        self._tasks = tasks
        self._executor = executor
        self._scheduler = scheduler
        self._grammars = grammars
        self._metrics = DecodeMetrics.create(worker.registry)
        self._inlet = KvInlet(
            worker, kv, landing, pull_timeout_s=pull_timeout_s, metrics=self._metrics
        )
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
        with unwrapped(), self._inlet:
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
        await self._work.until(lambda: self._scheduler.has_sequences)
        started_s = monotonic()
        async with self._worker.cores.turn() as turn:
            plan = self._scheduler.next_step()  # with all that came while others computed
            if plan:
                await self._compute(plan, turn, started_s)
        if not plan:
            await self._work.changed()

    async def _compute(self, plan: StepPlan, turn: Turn, started_s: float) -> None:
        for sequence in plan.returned:
            self._end(sequence, _preempted())
        try:
            with self._metrics.step_s.time():
                result = await self._worker.compute(turn.last(self._executor.step), plan)
            self._step_s = monotonic() - started_s
            self._guard.succeeded()
            measure(self._metrics, plan, result)
            events, ended = take_in(plan.batch, result)
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
        sequence = Sequence.begin(
            request,
            blocks,
            next_pos=prefilled.next_pos,
            last_token_id=prefilled.last_token_id,
            next_index=request.next_index + 1,
            grammar=prefilled.grammar,
        )
        return self._generate(sequence, request)

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
        # A grammar that cannot be used is refused before anything is reserved.
        await self._grammars.open_for(task.request)
        num_tokens, longest = task.kv.kv_len[0], task.request.max_context_tokens
        blocks = await self._room.until(
            lambda: self._scheduler.try_admit(num_tokens, longest, shared=self._own_blocks(task))
        )
        try:
            last_token_id = await self._received(task, blocks, ticket)
            grammar = await self._grammars.open_for(task.request, last_token_id)
        except BaseException as error:
            self._scheduler.withdraw(blocks)
            self._room.notify()
            self._work.notify()  # a sequence may have waited for these blocks
            if isinstance(error, Withdrawn):
                raise await error.when_nobody_else_ends_it() from error
            raise
        ticket.began()
        sequence = Sequence.begin(
            task.request,
            blocks,
            next_pos=task.kv.next_pos,
            last_token_id=last_token_id,
            next_index=task.next_index,
            grammar=grammar,
        )
        await self._generate(sequence, task.request)

    async def _received(self, task: DecodeTask, blocks: BlockHandle, ticket: Ticket) -> TokenId:
        """Bring the sequence's KV into its blocks; returns the newest token of its answer."""
        if not self._own_blocks(task) or task.last_token_id is None:
            return await self._inlet.receive(task, blocks, ticket)
        ticket.admit()
        await self._worker.transport.release(task.kv.tensor, task.request.request_id)
        return task.last_token_id

    def _own_blocks(self, task: DecodeTask) -> tuple[int, ...]:
        """The blocks that this process has leased to the task; empty if others hold its KV."""
        tensor = task.kv.tensor
        if self._hand_over is None or tensor.owner != self._worker.me:
            return ()
        return self._hand_over.leased(tensor.lease_id)

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


def _preempted() -> RequestFailed:
    return RequestFailed(
        FailureKind.PREEMPTED,
        "the answer gave its KV blocks to others and goes on from its tokens",
        retryable=True,
    )
