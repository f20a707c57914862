"""How embeddings get into this process' memory, each at most once.

In: a request's media items and rows of landing memory. Out: these rows filled. What the process
received lately is kept, so that the next request about the same picture asks nobody; of several
requests that need an embedding at the same time one fetches it and the others join. An embedding
that cannot be had from where it was announced (evicted, owner gone), and that nobody is making, is
asked for again: the request still names its picture. Of an item that was divided each part is
found, pulled and asked for by itself, into its own rows; what is kept is the whole.
"""

from __future__ import annotations

import asyncio
import logging
import uuid

import torch

from services.prefill.own_encoder import OwnEncoder
from services.prefill.search import Search
from shared.bus.base import WorkQueue
from shared.cache.embedding_pool import EmbeddingPool
from shared.clock import Clock, monotonic
from shared.errors import FailureKind, Outcome, RequestFailed, TransferError
from shared.messages.descriptor import MediaItem, MediaPart, RequestDescriptor, WorkerRef
from shared.messages.refs import EmbeddingRef
from shared.messages.work import EncodeTask
from shared.runtime.embedding_index import EmbeddingIndex
from shared.runtime.media_parts import known_parts
from shared.runtime.scope import unwrapped
from shared.runtime.signal import Signal
from shared.telemetry import names, tracing
from shared.telemetry.metrics import PrefillMetrics
from shared.transport.base import Transport
from shared.transport.tensors import byte_view

logger = logging.getLogger(__name__)

MAX_ENCODE_AGAIN = 3
ENCODE_AGAIN_AFTER_S = 30.0
"""A picture that is claimed and that nobody announced for so long is asked for again; its task may
just be queued, and then the second one finds the first one's embedding."""
UNCLAIMED_GRACE_S = 0.25
"""A claim and the task that it stands for travel by different ways: it may be a little late."""


class EmbeddingReceiver:
    """Brings a request's embeddings into this process' memory."""

    def __init__(
        self,
        index: EmbeddingIndex,
        transport: Transport,
        encode_tasks: WorkQueue[EncodeTask],
        *,
        me: WorkerRef,
        hidden_size: int,
        dtype: torch.dtype,
        pool_bytes: int,
        pull_timeout_s: float,
        metrics: PrefillMetrics,
        own_encoder: OwnEncoder | None = None,
        clock: Clock = monotonic,
    ) -> None:
        self._index = index
        self._transport = transport
        self._encode_tasks = encode_tasks
        self._me = me
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._pull_timeout_s = pull_timeout_s
        self._metrics = metrics
        self._own_encoder = own_encoder
        self._clock = clock
        self._pool: EmbeddingPool[torch.Tensor] = EmbeddingPool(pool_bytes)
        metrics.pool_usage.set_function(lambda: self._pool.used_bytes / pool_bytes)
        self._fetching: set[str] = set()  # content keys
        self._fetched = Signal()

    def num_bytes(self, request: RequestDescriptor, *, num_skipped: int = 0) -> int:
        """Landing memory that the embeddings of a request take, without its first pictures."""
        num_tokens = sum(item.num_tokens for item in request.media[num_skipped:])
        return num_tokens * self._hidden_size * self._dtype.itemsize

    def skip(self, request: RequestDescriptor, num_skipped: int) -> None:
        """The first pictures of a request need no embedding: their keys and values are cached."""
        if num_skipped:
            self._metrics.embeddings.labels("prefix").inc(num_skipped)

    def landing(
        self, media: tuple[MediaItem, ...]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Memory for the embeddings of these items in order, whole and as the rows of each."""
        num_tokens = [item.num_tokens for item in media]
        landing = torch.empty(sum(num_tokens), self._hidden_size, dtype=self._dtype)
        return landing, torch.split(landing, num_tokens)

    async def receive_item(
        self, request: RequestDescriptor, item: MediaItem, into: torch.Tensor
    ) -> None:
        """Fill `into`, `[item.num_tokens, hidden]`, as soon as the item's embedding can be had.

        Every item may be awaited by itself, in any order and several times; what stands in the
        request twice is pulled once. Raises `RequestFailed`.
        """
        key, source = item.content_key, "pool"
        while (kept := self._pool.get(key)) is None:
            if key not in self._fetching:
                await self._fetch(request, item, into)
                self._metrics.embeddings.labels("pulled").inc()
                return
            source = "joined"
            with tracing.span(names.WAIT_EMBEDDING):
                await self._fetched.until(lambda: key not in self._fetching)
        _check_shape(item, tuple(kept.shape), into)
        into.copy_(kept)
        self._metrics.embeddings.labels(source).inc()
        await self._let_go_all(request, item)

    async def _fetch(self, request: RequestDescriptor, item: MediaItem, into: torch.Tensor) -> None:
        """Pull the embedding and keep a copy; whoever waits for it looks again afterwards."""
        self._fetching.add(item.content_key)
        try:
            owners = await self._search(Search(request, item, self._clock()), into)
            if owners != {self._me}:  # else the encoder of this process keeps it
                self._keep(item.content_key, into)
        finally:
            self._fetching.discard(item.content_key)
            self._fetched.notify()
        await self._let_go(request, item.content_key)

    def _keep(self, key: str, embedding: torch.Tensor) -> None:
        num_bytes = embedding.nbytes
        if num_bytes <= self._pool.max_bytes and self._pool.try_reserve(key, num_bytes):
            self._pool.fill(key, embedding.clone())

    async def _let_go_all(self, request: RequestDescriptor, item: MediaItem) -> None:
        """Nor need those of its parts be kept, if it was divided."""
        await self._let_go(request, item.content_key)
        for part in known_parts(self._index, item):
            await self._let_go(request, part.content_key)

    async def _let_go(self, request: RequestDescriptor, key: str) -> None:
        """The owner need not keep the embedding for this attempt any longer. An announcement that
        is still to come is let go with the whole request."""
        ref = self._index.find(key)
        held = ref.held_for(request.request_id, request.attempt) if ref is not None else None
        if held is not None:
            await self._transport.release(held, request.request_id)

    async def _search(self, search: Search, into: torch.Tensor) -> set[WorkerRef]:
        """Fill `into`; returns who had it."""
        while True:
            found = await self._announced(search)
            if found is None:
                await self._ask(search)
                continue
            if isinstance(found, tuple):
                return await self._search_parts(search, found, into)
            try:
                await self._pull(found, search.item, into)
            except TransferError as error:
                if error.outcome is Outcome.INCOMPATIBLE:
                    raise RequestFailed(FailureKind.INTERNAL, str(error)) from error
                search.lost_lease_ids.append(found.tensor.lease_id)
                search.last_loss = str(error)
            else:
                if search.part is not None:  # at once: the next part may need its room
                    await self._let_go(search.request, search.key)
                return {found.tensor.owner}

    async def _search_parts(
        self, search: Search, parts: tuple[MediaPart, ...], into: torch.Tensor
    ) -> set[WorkerRef]:
        """Every part into its rows, all at the same time."""
        request, item = search.request, search.item
        with unwrapped():
            async with asyncio.TaskGroup() as scope:
                tasks = [
                    scope.create_task(
                        self._search(Search(request, item, self._clock(), part), into[part.rows])
                    )
                    for part in parts
                ]
        return {owner for task in tasks for owner in task.result()}

    async def _announced(self, search: Search) -> EmbeddingRef | tuple[MediaPart, ...] | None:
        """Where to pull from, or the parts to look for, once somebody says so; None if nobody
        will."""
        key = search.key
        with tracing.span(names.WAIT_EMBEDDING), self._metrics.embedding_wait_s.time():
            unclaimed_s: float | None = None
            while (ref := self._index.find(key, excluding=search.lost_lease_ids)) is None:
                if search.part is None and (parts := known_parts(self._index, search.item)):
                    return parts
                if self._here(search) is not None:
                    return None
                now_s = self._clock()
                if self._index.claim_of(key) is not None:
                    unclaimed_s = None
                    if now_s >= search.asked_s + ENCODE_AGAIN_AFTER_S:
                        return None
                else:
                    unclaimed_s = now_s if unclaimed_s is None else unclaimed_s
                    if search.lost_lease_ids or now_s >= unclaimed_s + UNCLAIMED_GRACE_S:
                        return None
                await self._index.changed()
            return ref

    def _here(self, search: Search) -> OwnEncoder | None:
        """This process' own encoder, where it is the quickest way."""
        own = self._own_encoder
        return own if own is not None and own.is_quicker(search.key, search.num_patches) else None

    async def _pull(self, ref: EmbeddingRef, item: MediaItem, into: torch.Tensor) -> None:
        _check_shape(item, (ref.num_tokens, ref.hidden_size), into)
        with (
            tracing.span(names.TRANSFER_EMBEDDING, num_bytes=ref.tensor.num_bytes),
            self._metrics.embedding_transfer_s.time(),
        ):
            await self._transport.pull(
                ref.tensor, 0, byte_view(into), timeout_s=self._pull_timeout_s
            )

    async def _ask(self, search: Search) -> None:
        """Have it made here, or queue an encode task: nobody has the embedding, or whoever makes it
        takes too long."""
        request, item = search.request, search.item
        if search.num_asked >= MAX_ENCODE_AGAIN:
            raise RequestFailed(
                FailureKind.WORKER_LOST,
                f"picture {item.sha256[:12]} was asked for {search.num_asked} times in vain, "
                f"last: {search.last_loss}",
                retryable=True,
            )
        search.num_asked += 1
        if (encoder := self._here(search)) is not None:
            self._metrics.embeddings_here.inc()
            lost = tuple(search.lost_lease_ids)
            await encoder.encode(EncodeTask.of(request, item, search.part, lost_lease_ids=lost))
            return
        insists = self._index.claim_of(search.key) is not None
        logger.info("picture %s is asked for again: %s", item.sha256[:12], search.last_loss)
        task = EncodeTask.of(
            request,
            item,
            search.part,
            lost_lease_ids=tuple(search.lost_lease_ids),
            insists=insists,
        )
        # Names what was lost, not how often: a redelivered prompt counts from one again, and a
        # repeated message id would be dropped as a duplicate.
        cause = self._index.cause_of_loss(search.key)
        if cause is None or insists:
            cause = uuid.uuid4().hex[:12]
        prefix = f"{request.request_id}:{request.attempt}"
        message_id = f"{prefix}:again:{search.key[:16]}:{cause}"
        # The claim first: it must not come after the announcement that answers the task.
        await self._index.put(task.claim())
        await self._encode_tasks.put(task, message_id=message_id, headers=tracing.inject())
        self._metrics.embeddings_asked.inc()
        search.asked_s = self._clock()


def _check_shape(item: MediaItem, announced: tuple[int, ...], into: torch.Tensor) -> None:
    if announced != tuple(into.shape):
        raise RequestFailed(
            FailureKind.INTERNAL,
            f"embedding {item.content_key[:12]} is announced as {list(announced)}, "
            f"the prompt has room for {list(into.shape)}",
        )
