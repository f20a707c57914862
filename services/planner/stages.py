"""The stages of a simulated worker, around the very schedulers of the services.

In: tasks from shared queues. Out: steps on the worker's device, and tasks for the next stage. A
worker takes one task at a time while it has room, as the services do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from services.decode.scheduler import DecodeScheduler
from services.decode.sequence import Sequence
from services.encoder.scheduler import EncodeScheduler
from services.planner.cluster import Limits, Links
from services.planner.engine import Device, TaskQueue, Timeline
from services.planner.perf_model import PerformanceModel
from services.planner.request import SimRequest
from services.prefill.batch import PrefillBatch
from services.prefill.scheduler import PrefillScheduler
from shared.cache.block_pool import BlockHandle, BlockPool
from shared.errors import RequestFailed
from shared.messages.descriptor import SamplingParams, WorkerRef
from shared.model.sampling_row import SamplingState

GATEWAY = WorkerRef(name="gateway", incarnation=1)


@dataclass(eq=False)
class Picture:
    """A task for an encoder."""

    request: SimRequest
    num_patches: int


@dataclass(eq=False)
class Prefilled:
    """A task for a decoder: its KV lies in `blocks` on the worker `owner`."""

    request: SimRequest
    owner: PrefillSide
    blocks: BlockHandle


@dataclass(frozen=True)
class World:
    """What all stages share."""

    timeline: Timeline
    model: PerformanceModel
    limits: Limits
    links: Links
    pictures: TaskQueue[Picture]
    prompts: TaskQueue[SimRequest]
    prefilled: TaskQueue[Prefilled]
    embedded: Callable[[Picture, int], None]
    ended: Callable[[SimRequest, bool], None]  # and whether it was refused


class EncodeSide:
    """Embeds pictures in batches."""

    def __init__(self, world: World, worker: int, device: Device) -> None:
        self._world, self._worker, self._device = world, worker, device
        self._scheduler: EncodeScheduler[Picture] = EncodeScheduler(world.limits.max_batch_patches)
        self._num_held = 0
        self._in_step = False
        world.pictures.take(self._taken)

    def _taken(self, picture: Picture) -> None:
        self._num_held += 1
        self._scheduler.add(picture)
        if self._num_held < self._world.limits.max_held:
            self._world.pictures.take(self._taken)
        self._step()

    def _step(self) -> None:
        if self._in_step or not (batch := self._scheduler.next_batch()):
            return
        self._in_step = True
        seconds = self._world.model.encode_s(sum(each.num_patches for each in batch))
        self._device.compute(seconds, lambda: self._end(batch))

    def _end(self, batch: list[Picture]) -> None:
        self._in_step = False
        was_full = self._num_held >= self._world.limits.max_held
        self._num_held -= len(batch)
        for picture in batch:
            self._world.embedded(picture, self._worker)
        if was_full:
            self._world.pictures.take(self._taken)
        self._step()


class PrefillSide:
    """Computes prompts whose embeddings have landed; beside a decode stage, in its blocks."""

    def __init__(
        self, world: World, worker: int, device: Device, pool: BlockPool, here: DecodeSide | None
    ) -> None:
        self._world, self._worker, self._device = world, worker, device
        self.pool, self._here = pool, here
        limits = world.limits
        max_tokens, chunk = limits.max_batch_tokens, limits.chunk_tokens
        if here is not None and limits.mixed_step_tokens:
            max_tokens = min(max_tokens, limits.mixed_step_tokens)
            chunk = min(chunk or max_tokens, max_tokens)
        self._scheduler: PrefillScheduler[SimRequest] = PrefillScheduler(
            pool,
            max_batch_tokens=max_tokens,
            chunk_tokens=chunk,
            reserves_answers=here is not None,
        )
        self._num_held = 0
        self._is_taking = False
        self._in_step = False
        self._num_leased = 0
        self._unplaced: list[SimRequest] = []  # prefilled, and must neither start nor queue yet
        self._held: dict[int, SimRequest] = {}
        if here is not None:
            here.neighbour = self
        self._take()

    def landed(self, request: SimRequest) -> None:
        """A picture of a request was announced; those that wait here look at it."""
        if request.index in self._held and request.num_missing == 0:
            del self._held[request.index]
            self._receive(request)

    def wake(self) -> None:
        """Blocks may have become free."""
        while self._unplaced and self._place(self._unplaced[0]):
            del self._unplaced[0]
        self._step()

    def release(self, blocks: BlockHandle) -> None:
        """A decoder has the KV of a lease."""
        self._num_leased -= len(blocks)
        blocks.free()
        self._left()

    def _take(self) -> None:
        if not self._is_taking and self._num_held < self._world.limits.max_held:
            self._is_taking = True
            self._world.prompts.take(self._taken)

    def _taken(self, request: SimRequest) -> None:
        self._is_taking = False
        self._num_held += 1
        if request.num_missing:
            self._held[request.index] = request
        else:
            self._receive(request)
        self._take()

    def _receive(self, request: SimRequest) -> None:
        away = sum(patches for worker, patches in request.encoded_at if worker != self._worker)
        num_bytes = away * self._world.model.embedding_bytes_per_patch
        delay_s = self._world.links.transfer_s(num_bytes) if away else 0.0
        self._world.timeline.after(delay_s, lambda: self._add(request))

    def _add(self, request: SimRequest) -> None:
        try:
            self._scheduler.add(request)
        except RequestFailed:
            self._finish(request, is_refused=True)
            return
        self._step()

    def _step(self) -> None:
        if self._in_step or (batch := self._scheduler.next_batch()) is None:
            return
        self._in_step = True
        seconds = self._world.model.prefill_s((each.start, each.stop) for each in batch)
        self._device.compute(seconds, lambda: self._end(batch))

    def _end(self, batch: PrefillBatch[SimRequest]) -> None:
        self._in_step = False
        self._scheduler.end_step(batch)
        for each in batch:
            if not each.is_last:
                continue
            request = each.job
            request.first_s = self._world.timeline.now_s + self._world.links.token_hop_s
            if request.arrival.num_output_tokens == 1:
                assert request.blocks is not None
                request.blocks.free()
                self._finish(request)
            elif self._unplaced or not self._place(request):
                self._unplaced.append(request)
        self._step()

    def _place(self, request: SimRequest) -> bool:
        """Decode here, or queue under a lease; beside a decode stage leases hold half of the pool
        at most."""
        blocks = request.blocks
        assert blocks is not None
        if self._here is not None:
            if self._here.accept(request, blocks.block_ids):
                blocks.free()
                self._num_held -= 1
                self._take()
                return True
            if self._num_leased + len(blocks) > self.pool.num_blocks // 2:
                return False
        self._num_leased += len(blocks)
        self._num_held -= 1
        self._world.prefilled.put(Prefilled(request, self, blocks))
        self._take()
        return True

    def _finish(self, request: SimRequest, *, is_refused: bool = False) -> None:
        self._num_held -= 1
        self._world.ended(request, is_refused)
        self._take()

    def _left(self) -> None:
        self.wake()
        if self._here is not None:
            self._here.room()


class DecodeSide:
    """Generates the answers of many sequences at once."""

    def __init__(self, world: World, worker: int, device: Device, pool: BlockPool) -> None:
        self._world, self._worker, self._device = world, worker, device
        self._scheduler = DecodeScheduler(pool, max_batch=world.limits.max_batch)
        self._requests: dict[Sequence, SimRequest] = {}
        self._head: Prefilled | None = None  # taken, and waits for memory
        self._is_taking = False
        self._in_step = False
        self.neighbour: PrefillSide | None = None
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
        num_bytes = request.num_tokens * self._world.model.kv_bytes_per_token
        delay_s = 0.0 if is_own else self._world.links.transfer_s(num_bytes)
        self._world.timeline.after(delay_s, lambda: self._land(task, blocks))
        self._take()

    def _land(self, task: Prefilled, blocks: BlockHandle) -> None:
        self._start(task.request, blocks)
        task.owner.release(task.blocks)

    def _start(self, request: SimRequest, blocks: BlockHandle) -> None:
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
        self._device.compute(seconds, lambda: self._end(plan.batch))

    def _end(self, batch: tuple[Sequence, ...]) -> None:
        self._in_step = False
        self._scheduler.end_step()
        has_room = False
        for sequence in batch:
            # As `Sequence.append`, without the messages that it makes for the gateway.
            sequence.kv_len += 1
            sequence.next_index += 1
            if sequence.num_remaining == 0:
                self._scheduler.retire(sequence)
                self._world.ended(self._requests.pop(sequence), False)
                has_room = True
        if has_room:
            self.room()
            if self.neighbour is not None:
                self.neighbour.wake()
        self._step()
