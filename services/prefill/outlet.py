"""Where a prefilled sequence goes: the decode stage of this process, or the queue of all decoders.

In: a request, its blocks and its first token. Out: an answer that is complete, or a `DecodeTask`
that is queued with the KV exposed under a lease. Owns the blocks until then.
"""

from __future__ import annotations

import asyncio
import uuid

from services.prefill.executor import FirstToken, PrefillExecutor
from shared.bus.base import WorkQueue
from shared.cache.block_pool import BlockHandle
from shared.cache.geometry import KvGeometry
from shared.errors import QueueFull
from shared.messages.descriptor import RequestDescriptor
from shared.messages.refs import KvRef
from shared.messages.work import DecodeTask
from shared.model.grammar import Grammars
from shared.runtime.hand_over import HandOver, Prefilled
from shared.runtime.signal import Signal
from shared.runtime.worker import Worker
from shared.telemetry import tracing
from shared.transport.base import Segment
from shared.transport.tensors import byte_view

QUEUE_FULL_RETRY_S = 0.05
INSTANT_GATHER_BYTES = 1024 * 1024
"""KV up to this size is gathered on the event loop: copying it takes less than a thread switch."""


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
        geometry: KvGeometry,
        work: Signal,
        room: Signal,
        here: HandOver | None,
    ) -> None:
        self._worker = worker
        self._decode_tasks = decode_tasks
        self._executor = executor
        self._grammars = grammars
        self._geometry = geometry
        self._work = work
        self._room = room
        self._here = here

    @property
    def num_answers(self) -> int:
        """Tasks that are being decoded in this process: they take no room here any more."""
        return self._here.num_answers if self._here is not None else 0

    async def send(
        self, request: RequestDescriptor, blocks: BlockHandle, first: FirstToken
    ) -> None:
        """Decode here if there is room, else expose the KV and queue the decode task; from there
        on the lease owns the blocks."""
        if self._here is not None and await self._decoded_here(self._here, request, blocks, first):
            return
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

    def _expose(self, request: RequestDescriptor, blocks: BlockHandle, first: FirstToken) -> KvRef:
        lease_id = f"kv.{request.request_id}.{request.attempt}.{uuid.uuid4().hex[:8]}"

        def released() -> None:
            blocks.free()
            if self._here is not None:
                self._here.ended(lease_id)
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
            lease_id,
            [segment],
            holders=[request.request_id],
            on_release=released,
        )
        if self._here is not None:
            self._here.opened(lease_id, block_ids)
        kv_len = (num_tokens,) * self._geometry.num_layers
        return KvRef(tensor=tensor, kv_len=kv_len, next_pos=first.next_pos)
