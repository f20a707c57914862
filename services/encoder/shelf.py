"""What an encoder keeps and offers: finished embeddings, their leases, their announcements.

In: embeddings under content keys, and the tasks that asked for them. Out: entries of the
`embeddings` bucket that last as long as the memory behind them. Every embedding in the pool is
offered to all under a standing lease; the attempt that asked for it holds it besides, so that it
cannot be evicted before it was pulled.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Coroutine

import torch

from shared.cache.embedding_pool import EmbeddingPool
from shared.messages.descriptor import WorkerRef
from shared.messages.refs import EmbeddingRef, TensorRef, embedding_lease_id
from shared.messages.work import EncodeTask
from shared.runtime.embedding_index import EmbeddingIndex
from shared.runtime.signal import Signal
from shared.runtime.worker import Worker
from shared.transport.base import Segment
from shared.transport.lease import STANDING
from shared.transport.tensors import byte_view


class Shelf:
    """The pool of one encoder. `room` is told when memory may have become free."""

    def __init__(
        self,
        worker: Worker,
        index: EmbeddingIndex,
        pool_bytes: int,
        room: Signal,
        *,
        encodes: Callable[[WorkerRef], bool],
    ) -> None:
        self._worker = worker
        self._encodes = encodes
        self._index = index
        self._room = room
        self._offered: dict[str, TensorRef] = {}  # standing leases by content key
        self._background: set[asyncio.Task[None]] = set()
        self.pool: EmbeddingPool[torch.Tensor] = EmbeddingPool(pool_bytes, on_evict=self._on_evict)

    def is_elsewhere(self, task: EncodeTask) -> bool:
        """Whether another worker has the embedding or is making it."""
        me, key = self._worker.me, task.content_key
        if key in self.pool:
            return False
        ref = self._index.find(key, excluding=task.lost_lease_ids)
        if ref is not None:
            return ref.tensor.owner != me
        claim = self._index.claim_of(key)
        if task.insists or claim is None or claim.encoder in (None, me):
            return False
        # One that changes its role hands its tasks back, and its claim stays behind.
        return self._encodes(claim.encoder)

    def claim(self, task: EncodeTask) -> None:
        """Tell all that this worker makes the embedding; the work does not wait for it."""
        self._in_background(self._index.put(task.claim(self._worker.me)))

    async def announce(self, task: EncodeTask) -> None:
        """Keep an embedding of the pool for the task's attempt, and offer it to all."""
        key = task.content_key
        embedding = self.pool.pin(key)
        lease_id = embedding_lease_id(task.request_id, task.attempt, uuid.uuid4().hex[:12])

        def released() -> None:
            self.pool.unpin(key)
            self._room.notify()

        self._worker.transport.expose(
            lease_id, [_segment(embedding)], holders=[task.request_id], on_release=released
        )
        num_tokens, hidden_size = embedding.shape
        ref = EmbeddingRef(
            content_key=key,
            num_tokens=num_tokens,
            hidden_size=hidden_size,
            tensor=self._offer(task, embedding),
            held_lease_id=lease_id,
        )
        await self._index.put(ref)

    def _offer(self, task: EncodeTask, embedding: torch.Tensor) -> TensorRef:
        """The standing lease; a new one if the old one could not be read."""
        key = task.content_key
        known = self._offered.get(key)
        if known is not None and known.lease_id not in task.lost_lease_ids:
            return known
        if known is not None:
            self._worker.transport.revoke(known.lease_id)
        self._offered[key] = self._worker.transport.expose(
            f"emb.{key[:32]}.{uuid.uuid4().hex[:12]}",
            [_segment(embedding)],
            holders=[STANDING],
            on_release=lambda: None,  # the pool's accounts end with the eviction
        )
        return self._offered[key]

    def _on_evict(self, key: str) -> None:
        offered = self._offered.pop(key, None)
        if offered is not None:
            self._worker.transport.revoke(offered.lease_id)
            self._in_background(self._index.withdraw(key, offered.lease_id))

    def _in_background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _segment(embedding: torch.Tensor) -> Segment:
    return Segment(embedding.nbytes, lambda: byte_view(embedding), is_instant=True)
