"""Where a prefilled sequence goes: the decode stage of this process, or the queue of all decoders.

In: jobs, then their first tokens. Out: an answer that is complete, or a `DecodeTask` that is queued
with the KV exposed under a lease, already while the job is computed where the plan says so. Owns
the blocks of a computed job until then.
"""

from __future__ import annotations

import asyncio

from services.prefill.announcement import Announcement
from services.prefill.executor import FirstToken, PrefillExecutor
from services.prefill.exposure import KvExposer
from services.prefill.job import PrefillJob
from services.prefill.pieces import PiecePlan
from shared.bus.base import WorkQueue
from shared.cache.block_pool import BlockHandle
from shared.errors import QueueFull
from shared.messages.descriptor import RequestDescriptor
from shared.messages.refs import KvRef
from shared.messages.work import DecodeTask
from shared.model.grammar import Grammars
from shared.runtime.hand_over import HandOver, Prefilled
from shared.runtime.signal import Signal
from shared.runtime.worker import Worker
from shared.telemetry import tracing

QUEUE_FULL_RETRY_S = 0.05


class Outlet:
    """Hands prefilled sequences over.

    `work` is told when blocks are free again, `room` when a task takes no room in this stage any
    more. `here` leads to the decode stage of this process, if it has one.
    """

    def __init__(
        self,
        worker: Worker,
        decode_tasks: WorkQueue[DecodeTask],
        *,
        executor: PrefillExecutor,
        grammars: Grammars,
        plan: PiecePlan,
        work: Signal,
        room: Signal,
        here: HandOver | None,
    ) -> None:
        self._worker = worker
        self._decode_tasks = decode_tasks
        self._grammars = grammars
        self._exposer = KvExposer(worker.transport, executor, plan)
        # Where this process decodes as well, it comes first, and only a whole sequence can tell
        # whether it has room.
        self._plan = None if here is not None else plan
        self._work = work
        self._room = room
        self._here = here

    @property
    def num_answers(self) -> int:
        """Tasks that are being decoded in this process: they take no room here any more."""
        return self._here.num_answers if self._here is not None else 0

    def announce(self, job: PrefillJob) -> Announcement | None:
        """Tell decoders of a prompt as soon as it is being computed; None where that is not done.

        An answer that ends with its first token needs none, and where all travels in one piece
        there is nothing to be early with.
        """
        request = job.request
        if self._plan is None or not self._plan.is_divided(request.num_tokens):
            return None
        if request.next_index + 1 >= request.sampling.max_tokens:
            return None
        return Announcement(
            job, self._exposer, self._worker.transport, self._decode_tasks, self._work
        )

    async def send(
        self, job: PrefillJob, first: FirstToken, announcement: Announcement | None
    ) -> None:
        """Decode here if there is room, else let a decoder have it; then the lease has the
        blocks."""
        request, blocks = job.request, job.blocks
        assert blocks is not None
        if announcement is not None:
            job.progress.complete(first.token_id)
            try:
                if await announcement.confirmed():
                    blocks.free()
                    self._work.notify()
                    return
            except BaseException:
                announcement.withdraw()
                blocks.free()
                self._work.notify()
                raise
        if self._here is not None and await self._decoded_here(self._here, request, blocks, first):
            return
        kv = self._expose(job, blocks, first)
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

    async def _decoded_here(
        self, here: HandOver, request: RequestDescriptor, blocks: BlockHandle, first: FirstToken
    ) -> bool:
        """Wait for the answer; False if the decode stage of this process has no room."""
        try:
            grammar = await self._grammars.open_for(request, first.token_id)
            answer = await here.offer(
                Prefilled(request, blocks.block_ids, first.token_id, first.next_pos, grammar)
            )
        except BaseException:
            blocks.free()
            here.room.notify()
            raise
        if answer is None:
            return False
        blocks.free()  # the answer has references of its own
        here.num_answers += 1
        self._room.notify()
        try:
            await answer
        finally:
            here.num_answers -= 1
            here.room.notify()
        return True

    async def _queue_decode(self, task: DecodeTask) -> None:
        request = task.request
        message_id = f"{request.request_id}:{request.attempt}:decode"
        headers = tracing.inject()
        while True:
            try:
                await self._decode_tasks.put(task, message_id=message_id, headers=headers)
                return
            except QueueFull:
                # Decoders are behind. The pinned blocks hold new prompts back meanwhile; the
                # request's deadline bounds the wait.
                await asyncio.sleep(QUEUE_FULL_RETRY_S)

    def _expose(self, job: PrefillJob, blocks: BlockHandle, first: FirstToken) -> KvRef:
        here, lease_id = self._here, ""

        def released() -> None:
            if here is not None:
                here.ended(lease_id)
            self._work.notify()

        block_ids = blocks.block_ids
        kv = self._exposer.expose(job, blocks, next_pos=first.next_pos, on_release=released)
        lease_id = kv.tensor.lease_id
        if here is not None:
            here.opened(lease_id, block_ids)
        return kv
