"""Where embeddings are announced, and how they get here.

The index mirrors the `embeddings` bucket, so that an announcement made before the request was taken
is known and none made later is missed. An embedding that cannot be had from its announced owner
(evicted, expired, owner gone) is encoded again: the request still names its picture.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Collection

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

MAX_ANNOUNCEMENTS = 100_000
MAX_ENCODE_AGAIN = 3


class EmbeddingIndex:
    """The newest announcement of every content key."""

    def __init__(self, bucket: KeyValue, max_entries: int = MAX_ANNOUNCEMENTS) -> None:
        self._bucket = bucket
        self._max_entries = max_entries
        self._refs: OrderedDict[str, EmbeddingRef] = OrderedDict()
        self._changed = Signal()

    async def run(self) -> None:
        """Follow the bucket for ever."""
        async for entry in self._bucket.watch():
            if entry.value is None:
                self._refs.pop(entry.key, None)
                continue
            try:
                self._add(entry.key, decode(entry.value, EmbeddingRef))
            except ProtocolError as error:
                logger.warning("announcement %s ignored: %s", entry.key, error)

    async def wait_for(self, content_key: str, *, excluding: Collection[str]) -> EmbeddingRef:
        """The announcement of an embedding whose lease is none of `excluding`, once there is
        one."""

        def known() -> EmbeddingRef | None:
            ref = self._refs.get(content_key)
            return ref if ref is not None and ref.tensor.lease_id not in excluding else None

        ref = await self._changed.until(known)
        assert ref is not None
        return ref

    async def forget(self, ref: EmbeddingRef) -> None:
        """The announcement turned out to be stale: delete it, unless a newer one took its place."""
        if self._refs.get(ref.content_key) == ref:
            del self._refs[ref.content_key]
            await self._bucket.delete(ref.content_key)

    def _add(self, key: str, ref: EmbeddingRef) -> None:
        self._refs[key] = ref
        self._refs.move_to_end(key)
        while len(self._refs) > self._max_entries:
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

    def num_bytes(self, request: RequestDescriptor) -> int:
        """Landing memory that all embeddings of a request take."""
        num_tokens = sum(item.num_tokens for item in request.media)
        return num_tokens * self._hidden_size * self._dtype.itemsize

    async def receive(self, request: RequestDescriptor) -> torch.Tensor | None:
        """All embeddings of a request in prompt order, `[num_media_tokens, hidden]`, or None.

        Every picture lands in its own rows, so the order of arrival does not matter; one that
        stands in the request several times is pulled once.
        """
        if not request.media:
            return None
        num_tokens = sum(item.num_tokens for item in request.media)
        landing = torch.empty(num_tokens, self._hidden_size, dtype=self._dtype)
        rows = torch.split(landing, [item.num_tokens for item in request.media])
        places: dict[str, list[torch.Tensor]] = {}
        for item, into in zip(request.media, rows, strict=True):
            places.setdefault(item.content_key, []).append(into)
        items = {item.content_key: item for item in request.media}
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
        while True:
            with tracing.span(names.WAIT_EMBEDDING), self._metrics.embedding_wait_s.time():
                ref = await self._index.wait_for(item.content_key, excluding=stale)
            try:
                await self._pull(ref, item, into)
            except TransferError as error:
                if error.outcome is Outcome.INCOMPATIBLE:
                    raise RequestFailed(FailureKind.INTERNAL, str(error)) from error
                stale.add(ref.tensor.lease_id)
                await self._index.forget(ref)
                await self._encode_again(request, item, len(stale), error)
                continue
            await self._transport.release(ref.tensor, request.request_id)
            return

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
        self, request: RequestDescriptor, item: MediaItem, times: int, error: TransferError
    ) -> None:
        if times > MAX_ENCODE_AGAIN:
            raise RequestFailed(
                FailureKind.WORKER_LOST,
                f"picture {item.sha256[:12]} was lost {times} times, last: {error.detail}",
                retryable=True,
            )
        logger.info("picture %s is encoded again: %s", item.sha256[:12], error)
        task = EncodeTask(
            request_id=request.request_id,
            attempt=request.attempt,
            gateway=request.gateway,
            model=request.model,
            item=item,
            deadline_unix_s=request.deadline_unix_s,
        )
        message_id = f"{request.request_id}:{request.attempt}:encode:{item.offset}:again:{times}"
        await self._encode_tasks.put(task, message_id=message_id, headers=tracing.inject())
