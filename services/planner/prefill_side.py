"""A simulated prefill stage, around the very scheduler of the service.

In: prompts from the shared queue. Out: steps on the worker's device, first tokens, and sequences
for a decode stage: that of its own process first, as in the service.
"""

from __future__ import annotations

from services.planner.decode_side import DecodeSide
from services.planner.engine import Device
from services.planner.request import SimRequest
from services.planner.world import Prefilled, World
from services.prefill.batch import PrefillBatch
from services.prefill.scheduler import PrefillScheduler
from shared.cache.block_pool import BlockHandle, BlockPool
from shared.errors import RequestFailed
from shared.telemetry import names


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
        self._announced: dict[int, Prefilled] = {}
        if here is not None:
            here.neighbour = self
        self._take()

    def landed(self, request: SimRequest) -> None:
        """A picture of a request was announced; those that wait here look at it."""
        if request.index in self._held and request.num_missing == 0:
            del self._held[request.index]
            request.spend(names.WAIT_EMBEDDING, self._world.timeline.now_s - request.begun_s)
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
        request.spend(names.QUEUE_PREFILL, self._world.timeline.now_s - request.begun_s)
        request.begun_s = self._world.timeline.now_s
        if request.num_missing:
            self._held[request.index] = request
        else:
            self._receive(request)
        self._take()

    def _receive(self, request: SimRequest) -> None:
        away = sum(patches for worker, patches in request.encoded_at if worker != self._worker)
        num_bytes = away * self._world.model.embedding_bytes_per_patch
        request.begun_s = self._world.timeline.now_s
        if away:
            self._world.host.hop(
                self._world.links.transfer_s(num_bytes), lambda: self._add(request)
            )
        else:
            self._add(request)

    def _add(self, request: SimRequest) -> None:
        request.spend(names.TRANSFER_EMBEDDING, self._world.timeline.now_s - request.begun_s)
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
        for each in batch:
            if each.start == 0:
                each.job.begun_s = self._world.timeline.now_s
                self._announce(each.job)
        seconds = self._world.model.prefill_s((each.start, each.stop) for each in batch)
        self._world.compute(self._device, seconds, len(batch.slices), lambda: self._end(batch))

    def _announce(self, request: SimRequest) -> None:
        """Queue a prompt for decoders before it is computed, where its KV travels in pieces."""
        num_pieces = self._world.num_pieces(request.num_tokens)
        fits = self._scheduler.blocks_for(request.max_context_tokens) <= self.pool.num_blocks
        if self._here is None and num_pieces > 1 and fits and request.arrival.num_output_tokens > 1:
            task = self._task(request)
            task.num_pieces, task.is_complete = num_pieces, False
            self._announced[request.index] = task
            self._world.prefilled.put(task)

    def _task(self, request: SimRequest) -> Prefilled:
        assert request.blocks is not None
        return Prefilled(request, self, request.blocks, self._world.timeline.now_s)

    def _end(self, batch: PrefillBatch[SimRequest]) -> None:
        self._in_step = False
        self._scheduler.end_step(batch)
        first = [each.job for each in batch if each.is_last]
        if first:
            self._world.tell(len(first), lambda: self._seen(first))
        for request in first:
            request.spend(names.PREFILL, self._world.timeline.now_s - request.begun_s)
            if request.arrival.num_output_tokens == 1:
                assert request.blocks is not None
                request.blocks.free()
                self._finish(request)
            elif self._unplaced or not self._place(request):
                self._unplaced.append(request)
        self._step()

    def _seen(self, requests: list[SimRequest]) -> None:
        for request in requests:
            request.first_s = self._world.timeline.now_s
            if request.arrival.num_output_tokens == 1:
                request.ended_s = request.first_s

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
        announced = self._announced.pop(request.index, None)
        if announced is not None:
            announced.complete()
        else:
            self._world.prefilled.put(self._task(request))
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
