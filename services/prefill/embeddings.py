"""Where embeddings are announced, and how they get here.

The index mirrors the `embeddings` bucket, so that an announcement made before the request was taken
is known and none made later is missed. An embedding that cannot be had from its announced owner
(evicted, expired, owner gone) is encoded again: the request still names its picture.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import OrderedDict, deque
from collections.abc import Collection
from contextlib import aclosing

import torch

from shared.bus.base import KeyValue, WorkQueue
from shared.errors import FailureKind, Outcome, ProtocolError, RequestFailed, TransferError
from shared.messages.codec import decode
from shared.messages.descriptor import MediaItem, RequestDescriptor
from shared.messages.refs import EmbeddingRef
from shared.messages.work import EncodeTask
from shared.runtime.scope import unwrapped
from shared.runtime.signal import Signal
from shared.telemetry import names, tracing
from shared.telemetry.metrics import PrefillMetrics
from shared.transport.base import Transport
from shared.transport.tensors import byte_view

logger = logging.getLogger(__name__)

MAX_KEYS = 50_000
MAX_REFS_PER_KEY = 8
MAX_ENCODE_AGAIN = 3
ENCODE_AGAIN_AFTER_S = 30.0
"""A picture that nobody announced for so long is asked for again; its task may just be queued, and
then the second one finds the first one's embedding."""


class EmbeddingIndex:
    """The newest announcements of every content key.

    Several are kept: another request's announcement of the same picture must not hide one's own,
    whose lease lasts until one releases it. Nothing is ever deleted from the bucket, so that a late
    look at a stale announcement cannot wipe a fresh one; entries lapse.
    """

    def __init__(self, bucket: KeyValue, max_keys: int = MAX_KEYS) -> None:
        self._bucket = bucket
        self._max_keys = max_keys
        self._refs: OrderedDict[str, deque[EmbeddingRef]] = OrderedDict()
        self._changed = Signal()

    async def run(self) -> None:
        """Follow the bucket until it is closed."""
        async with aclosing(self._bucket.watch()) as entries:
            async for entry in entries:
                if entry.value is None:
                    self._refs.pop(entry.key, None)
                    continue
                try:
                    self._add(entry.key, decode(entry.value, EmbeddingRef))
                except ProtocolError as error:
                    logger.warning("announcement %s ignored: %s", entry.key, error)

    async def wait_for(
        self, content_key: str, request: RequestDescriptor, *, excluding: Collection[str]
    ) -> EmbeddingRef:
        """An announcement whose lease is none of `excluding`, once there is one: the attempt's own
        if it is there, else the newest."""

        def known() -> EmbeddingRef | None:
            refs = [
                ref
                for ref in self._refs.get(content_key, ())
                if ref.tensor.lease_id not in excluding
            ]
            own = (ref for ref in refs if ref.is_held_for(request.request_id, request.attempt))
            return next(own, refs[-1] if refs else None)

        return await self._changed.until(known)

    def _add(self, key: str, ref: EmbeddingRef) -> None:
        self._refs.setdefault(key, deque(maxlen=MAX_REFS_PER_KEY)).append(ref)
        self._refs.move_to_end(key)
        while len(self._refs) > self._max_keys:
            self._refs.popitem(last=False)
        self._changed.notify()


class EmbeddingReceiver:
    """Brings a request's embeddings into this process' memory."""

    def __init__(
        self,
        index: EmbeddingIndex,
        transport: Transport,
        encode_tasks: WorkQueue[EncodeTask],
        *,
        hidden_size: int,
        dtype: torch.dtype,
        pull_timeout_s: float,
        metrics: PrefillMetrics,
    ) -> None:
        self._index = index
        self._transport = transport
        self._encode_tasks = encode_tasks
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._pull_timeout_s = pull_timeout_s
        self._metrics = metrics

    def num_bytes(self, request: RequestDescriptor, *, num_skipped: int = 0) -> int:
        """Landing memory that the embeddings of a request take, without its first pictures."""
        num_tokens = sum(item.num_tokens for item in request.media[num_skipped:])
        return num_tokens * self._hidden_size * self._dtype.itemsize

    async def receive(
        self, request: RequestDescriptor, *, num_skipped: int = 0
    ) -> torch.Tensor | None:
        """The embeddings of a request in prompt order, `[num_media_tokens, hidden]`, or None.

        Its first `num_skipped` pictures are left out: their keys and values are cached. Every
        picture lands in its own rows, so the order of arrival does not matter; one that stands in
        the request several times is pulled once.
        """
        media = request.media[num_skipped:]
        if not media:
            return None
        num_tokens = sum(item.num_tokens for item in media)
        landing = torch.empty(num_tokens, self._hidden_size, dtype=self._dtype)
        rows = torch.split(landing, [item.num_tokens for item in media])
        places: dict[str, list[torch.Tensor]] = {}
        for item, into in zip(media, rows, strict=True):
            places.setdefault(item.content_key, []).append(into)
        items = {item.content_key: item for item in media}
        with unwrapped():
            async with asyncio.TaskGroup() as scope:
                for key, item in items.items():
                    scope.create_task(self._receive_one(request, item, places[key][0]))
        for first, *others in places.values():
            for other in others:
                other.copy_(first)
        return landing

    async def _receive_one(
        self, request: RequestDescriptor, item: MediaItem, into: torch.Tensor
    ) -> None:
        stale: set[str] = set()
        num_again = 0
        while True:
            ref = await self._announced(request, item, stale)
            lost = "no announcement came"
            if ref is not None:
                try:
                    await self._pull(ref, item, into)
                except TransferError as error:
                    if error.outcome is Outcome.INCOMPATIBLE:
                        raise RequestFailed(FailureKind.INTERNAL, str(error)) from error
                    lost = str(error)
                else:
                    await self._transport.release(ref.tensor, request.request_id)
                    return
                stale.add(ref.tensor.lease_id)
                if not ref.is_held_for(request.request_id, request.attempt):
                    continue  # another request's lease is over; the own announcement is to come
            num_again += 1
            await self._encode_again(request, item, num_again, ref, lost)

    async def _announced(
        self, request: RequestDescriptor, item: MediaItem, stale: Collection[str]
    ) -> EmbeddingRef | None:
        """The next announcement to try; None if none came in time (one may be lost with the
        bus)."""
        with tracing.span(names.WAIT_EMBEDDING), self._metrics.embedding_wait_s.time():
            try:
                async with asyncio.timeout(ENCODE_AGAIN_AFTER_S):
                    return await self._index.wait_for(item.content_key, request, excluding=stale)
            except TimeoutError:
                return None

    async def _pull(self, ref: EmbeddingRef, item: MediaItem, into: torch.Tensor) -> None:
        if (ref.num_tokens, ref.hidden_size) != tuple(into.shape):
            raise RequestFailed(
                FailureKind.INTERNAL,
                f"embedding {item.content_key[:12]} is announced as "
                f"{[ref.num_tokens, ref.hidden_size]}, the prompt has room for {list(into.shape)}",
            )
        with (
            tracing.span(names.TRANSFER_EMBEDDING, num_bytes=ref.tensor.num_bytes),
            self._metrics.embedding_transfer_s.time(),
        ):
            await self._transport.pull(
                ref.tensor, 0, byte_view(into), timeout_s=self._pull_timeout_s
            )

    async def _encode_again(
        self,
        request: RequestDescriptor,
        item: MediaItem,
        times: int,
        lost: EmbeddingRef | None,
        reason: str,
    ) -> None:
        if times > MAX_ENCODE_AGAIN:
            raise RequestFailed(
                FailureKind.WORKER_LOST,
                f"picture {item.sha256[:12]} was lost {times} times, last: {reason}",
                retryable=True,
            )
        logger.info("picture %s is encoded again: %s", item.sha256[:12], reason)
        task = EncodeTask(
            request_id=request.request_id,
            attempt=request.attempt,
            gateway=request.gateway,
            model=request.model,
            item=item,
            deadline_unix_s=request.deadline_unix_s,
        )
        # Names what was lost, not how often: a redelivered prompt counts from one again, and a
        # repeated message id would be dropped as a duplicate.
        cause = lost.tensor.lease_id if lost else uuid.uuid4().hex[:12]
        message_id = f"{request.request_id}:{request.attempt}:again:{cause}"
        await self._encode_tasks.put(task, message_id=message_id, headers=tracing.inject())
