"""How a running answer leaves a worker that changes its role: its KV goes to a sibling decoder.

In: a sequence between two steps, and its request. Out: its KV exposed under a lease and a
`DecodeTask` in the queue of all decoders, which goes on at the very next token. Knows nothing of
the stage; whether an answer leaves or is finished here is `leaves`' to say.
"""

from __future__ import annotations

import uuid

from services.decode.sequence import Sequence
from shared.bus.base import WorkQueue
from shared.cache.block_pool import BlockPool
from shared.cache.kv_cache import KvCache
from shared.messages.descriptor import RequestDescriptor
from shared.messages.refs import KvRef
from shared.messages.work import DecodeTask
from shared.runtime.worker import Worker
from shared.telemetry import tracing
from shared.transport.base import Segment
from shared.transport.tensors import byte_view, settled


def leaves(num_remaining: int, step_s: float, left_s: float) -> bool:
    """Whether an answer would not be complete within `left_s`, at one token per step."""
    return num_remaining * step_s > left_s or left_s <= 0


class Departure:
    """Sends sequences away. Their blocks stay leased until another decoder has pulled them."""

    def __init__(
        self, worker: Worker, decode_tasks: WorkQueue[DecodeTask], kv: KvCache, pool: BlockPool
    ) -> None:
        self._worker = worker
        self._decode_tasks = decode_tasks
        self._kv = kv
        self._pool = pool

    async def send(self, request: RequestDescriptor, sequence: Sequence) -> None:
        """Queue the rest of the answer. Call between steps; the sequence still has its blocks.

        Raises `BusError`; then nothing is left behind.
        """
        answer_ids = sequence.history[len(request.prompt_token_ids) :]
        kv = self._expose(sequence)
        task = DecodeTask(
            request=request.model_copy(update={"emitted_token_ids": tuple(answer_ids[:-1])}),
            kv=kv,
            last_token_id=sequence.last_token_id,
            next_index=sequence.next_index,
        )
        message_id = f"{request.request_id}:{request.attempt}:decode:{sequence.next_index}"
        try:
            await self._decode_tasks.put(task, message_id=message_id, headers=tracing.inject())
        except BaseException:
            self._worker.transport.revoke(kv.tensor.lease_id)
            raise

    def _expose(self, sequence: Sequence) -> KvRef:
        num_tokens, geometry = sequence.kv_len, self._kv.geometry
        num_blocks = -(-num_tokens // self._pool.block_size)
        blocks = self._pool.share(sequence.blocks.block_ids[:num_blocks])
        block_ids = blocks.block_ids
        tensor = self._worker.transport.expose(
            f"kv.{sequence.request_id}.{sequence.attempt}.{uuid.uuid4().hex[:8]}",
            [
                Segment(
                    num_tokens * geometry.bytes_per_token,
                    lambda: byte_view(settled(self._kv.gather(block_ids, num_tokens))),
                )
            ],
            holders=[sequence.request_id],
            on_release=blocks.free,
        )
        kv_len = (num_tokens,) * geometry.num_layers
        return KvRef(tensor=tensor, kv_len=kv_len, next_pos=sequence.next_pos)
