"""A simulated decode stage, around the very scheduler of the service.

In: prefilled sequences, from the shared queue or from the prefill stage beside it. Out: steps on
the worker's device until each answer is complete.
"""

from __future__ import annotations

from services.decode.scheduler import DecodeScheduler
from services.decode.sequence import Sequence
from services.planner.engine import Action, Device
from services.planner.request import SimRequest
from services.planner.world import KvOwner, Prefilled, World
from shared.cache.block_pool import BlockHandle, BlockPool
from shared.errors import RequestFailed
from shared.messages.descriptor import SamplingParams, WorkerRef
from shared.model.sampling_row import SamplingState
from shared.telemetry import names

GATEWAY = WorkerRef(name="gateway", incarnation=1)


class DecodeSide:
    """Generates the answers of many sequences at once."""

    def __init__(self, world: World, worker: int, device: Device, pool: BlockPool) -> None:
        self._world, self._worker, self._device = world, worker, device
        self._scheduler = DecodeScheduler(pool, max_batch=world.limits.max_batch)
        self._requests: dict[Sequence, SimRequest] = {}
        self._head: Prefilled | None = None  # taken, and waits for memory
        self._is_taking = False
        self._in_step = False
        self.neighbour: KvOwner | None = None
        self._take()

    def accept(self, request: SimRequest, shared: tuple[int, ...]) -> bool:
        """Begin an answer whose prompt this process has computed; False without room."""
        blocks = self._scheduler.try_admit(
            request.num_tokens, request.max_context_tokens, shared=shared
        )
        if blocks is not None:
            self._start(request, blocks)
        return blocks is not None

    def room(self) -> None:
        """Slots or blocks may have become free."""
        if self._head is not None:
            head, self._head = self._head, None
            self._taken(head)
        self._take()

    def _take(self) -> None:
        if self._is_taking or self._head is not None or self._scheduler.num_free_slots < 1:
            return
        self._is_taking = True
        self._world.prefilled.take(self._arrived)

    def _arrived(self, task: Prefilled) -> None:
        self._is_taking = False
        self._taken(task)

    def _taken(self, task: Prefilled) -> None:
        request = task.request
        is_own = task.owner is self.neighbour
        shared = task.blocks.block_ids if is_own else ()
        try:
            blocks = self._scheduler.try_admit(
                request.num_tokens, request.max_context_tokens, shared=shared
            )
        except RequestFailed:
            task.owner.release(task.blocks)
            self._world.ended(request, True)
            self._take()
            return
        if blocks is None:
            self._head = task
            return
        taken_s = self._world.timeline.now_s
        request.spend(names.QUEUE_DECODE, taken_s - task.queued_s)
        if is_own:
            self._land(task, blocks, taken_s)
        else:
            self._pull(task, lambda: self._land(task, blocks, taken_s))
        self._take()

    def _pull(self, task: Prefilled, landed: Action) -> None:
        """Where the prompt is still being computed its last piece travels afterwards, the others
        do so meanwhile."""
        num_bytes = task.request.num_tokens * self._world.model.kv_bytes_per_token
        links, host = self._world.links, self._world.host
        if task.is_complete:
            host.hop(links.transfer_s(num_bytes), landed)
            return
        last_bytes = num_bytes / task.num_pieces
        task.on_complete = lambda: host.hop(links.transfer_s(last_bytes), landed)
        self._world.aside(links.transfer_s(num_bytes - last_bytes))

    def _land(self, task: Prefilled, blocks: BlockHandle, taken_s: float) -> None:
        task.request.spend(names.TRANSFER_KV, self._world.timeline.now_s - taken_s)
        self._start(task.request, blocks)
        task.owner.release(task.blocks)

    def _start(self, request: SimRequest, blocks: BlockHandle) -> None:
        request.decoded_from_s = self._world.timeline.now_s
        sampling = SamplingParams(max_tokens=request.arrival.num_output_tokens)
        sequence = Sequence(
            request_id=str(request.index),
            attempt=0,
            gateway=GATEWAY,
            sampling=sampling,
            state=SamplingState(sampling, ()),
            blocks=blocks,
            kv_len=request.num_tokens,
            next_pos=request.num_tokens,
            last_token_id=0,
            next_index=1,
        )
        self._requests[sequence] = request
        self._scheduler.start(sequence)
        self._step()

    def _step(self) -> None:
        if self._in_step or not (plan := self._scheduler.next_step()):
            return
        self._in_step = True
        num_tokens = sum(sequence.kv_len for sequence in plan.batch)
        seconds = self._world.model.decode_s(num_tokens, len(plan.batch))
        num_rows = len(plan.batch)
        self._world.compute(self._device, seconds, num_rows, lambda: self._end(plan.batch))

    def _end(self, batch: tuple[Sequence, ...]) -> None:
        self._in_step = False
        self._scheduler.end_step()
        complete: list[SimRequest] = []
        for sequence in batch:
            # As `Sequence.append`, without the messages that it makes for the gateway.
            sequence.kv_len += 1
            sequence.next_index += 1
            if sequence.num_remaining == 0:
                self._scheduler.retire(sequence)
                complete.append(self._requests.pop(sequence))
        self._world.tell(len(batch), lambda: self._seen(complete))
        if complete:
            self._complete(complete)
            self.room()
            if self.neighbour is not None:
                self.neighbour.wake()
        self._step()

    def _complete(self, requests: list[SimRequest]) -> None:
        for request in requests:
            request.spend(names.DECODE, self._world.timeline.now_s - request.decoded_from_s)
            self._world.ended(request, False)

    def _seen(self, requests: list[SimRequest]) -> None:
        for request in requests:
            request.ended_s = self._world.timeline.now_s
