"""Which embeddings exist in the cluster, and which are being made: a mirror of one bucket.

In: what workers and gateways say of content keys, and who is gone or cancelled. Out: where an
embedding can be pulled, and whether somebody is at work on it. An entry counts only while its
worker lives and its request is wanted, so a stale one costs a look and never a wait. Knows neither
tensors nor pictures.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Collection
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any

from shared.bus import subjects
from shared.bus.base import Bus, KeyValue
from shared.clock import Clock, wall
from shared.errors import BusError, ProtocolError
from shared.messages.codec import decode, encode
from shared.messages.descriptor import WorkerRef
from shared.messages.refs import EmbeddingClaim, EmbeddingDivision, EmbeddingRef
from shared.runtime.cancellations import Cancellations
from shared.runtime.directory import WorkerDirectory
from shared.runtime.signal import Signal

logger = logging.getLogger(__name__)

MAX_KEYS = 50_000
RECHECK_S = 0.25
"""Deaths and cancellations come from elsewhere: whoever waits looks at them this often."""

Entry = EmbeddingRef | EmbeddingClaim | EmbeddingDivision


class EmbeddingIndex:
    """The newest entry of every content key.

    What this process notes is known to it at once, before the bus has it: of many requests that
    come at the same time only the first finds nothing.
    """

    def __init__(
        self,
        bucket: KeyValue,
        *,
        is_gone: Callable[[WorkerRef], bool],
        is_cancelled: Callable[[str, int], bool],
        within: AbstractAsyncContextManager[Any] | None = None,
        max_keys: int = MAX_KEYS,
        clock: Clock = wall,
    ) -> None:
        self._bucket = bucket
        self._is_gone = is_gone
        self._is_cancelled = is_cancelled
        self._within = within or contextlib.nullcontext()
        self._max_keys = max_keys
        self._clock = clock
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        # Content keys whose entry is, or was, a claim, in the order in which they were claimed.
        self._claimed: dict[str, None] = {}
        self._changed = Signal()

    async def run(self) -> None:
        """Follow the bucket until it is closed."""
        async with self._within, aclosing(self._bucket.watch()) as entries:
            async for entry in entries:
                if entry.value is None:
                    self._entries.pop(entry.key, None)
                    self._claimed.pop(entry.key, None)
                    self._changed.notify()
                    continue
                try:
                    self.note(_decoded(entry.value))
                except ProtocolError as error:
                    logger.warning("announcement %s ignored: %s", entry.key, error)

    def find(self, content_key: str, *, excluding: Collection[str] = ()) -> EmbeddingRef | None:
        """Where a live worker offers the embedding, under a lease that is none of `excluding`."""
        match self._entries.get(content_key):
            case EmbeddingRef(tensor=tensor) as ref if not (
                tensor.lease_id in excluding or self._is_gone(tensor.owner)
            ):
                return ref
        return None

    def claim_of(self, content_key: str) -> EmbeddingClaim | None:
        """Who is at work on the embedding, if somebody is."""
        match self._entries.get(content_key):
            case EmbeddingClaim(encoder=encoder) as claim if not (
                claim.deadline_unix_s <= self._clock()
                or self._is_cancelled(claim.request_id, claim.attempt)
                or (encoder is not None and self._is_gone(encoder))
            ):
                return claim
        return None

    def division_of(self, content_key: str) -> EmbeddingDivision | None:
        """How the embedding is divided, if it is; whether its parts exist is for each to say."""
        match self._entries.get(content_key):
            case EmbeddingDivision() as division:
                return division
        return None

    def claims(self) -> list[EmbeddingClaim]:
        """All work that is queued or under way, as far as this process knows; the oldest first."""
        found = {key: self.claim_of(key) for key in self._claimed}
        self._claimed = {key: None for key, claim in found.items() if claim is not None}
        return [claim for claim in found.values() if claim is not None]

    def cause_of_loss(self, content_key: str) -> str | None:
        """What the newest entry names, for one that is of no use; None if there is no entry."""
        match self._entries.get(content_key):
            case EmbeddingRef(tensor=tensor):
                return tensor.lease_id
            case EmbeddingClaim(encoder=None) as claim:
                return f"{claim.request_id}.{claim.attempt}"
            case EmbeddingClaim(encoder=WorkerRef(name=name, incarnation=incarnation)):
                return f"{name}.{incarnation}"
        return None

    async def changed(self) -> None:
        """Wait for the next change of any key, but not for long."""
        seen = False

        def once() -> bool:
            nonlocal seen
            before, seen = seen, True
            return before

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RECHECK_S):
                await self._changed.until(once)

    def note(self, entry: Entry) -> None:
        """Know an entry in this process, at once."""
        self._entries[entry.content_key] = entry
        self._entries.move_to_end(entry.content_key)
        if isinstance(entry, EmbeddingClaim):
            self._claimed.setdefault(entry.content_key)
        else:
            self._claimed.pop(entry.content_key, None)
        while len(self._entries) > self._max_keys:
            key, _ = self._entries.popitem(last=False)
            self._claimed.pop(key, None)
        self._changed.notify()

    async def put(self, entry: Entry) -> None:
        """Tell all. The entry counts here from the call on, and even if the bus does not take it:
        it saves work, and nothing is wrong without it."""
        self.note(entry)
        try:
            await self._bucket.put(entry.content_key, encode(entry))
        except BusError as error:
            logger.warning("embedding %s not announced: %s", entry.content_key[:12], error)

    async def withdraw(self, content_key: str, lease_id: str) -> None:
        """What was offered under this lease is no more; a newer entry of the key stays."""
        match self._entries.get(content_key):
            case EmbeddingRef(tensor=tensor) if tensor.lease_id == lease_id:
                del self._entries[content_key]
                self._changed.notify()
            case _:
                return
        try:
            await self._bucket.delete(content_key)
        except BusError as error:
            logger.warning("embedding %s not withdrawn: %s", content_key[:12], error)


def _decoded(data: bytes) -> Entry:
    with contextlib.suppress(ProtocolError):
        return decode(data, EmbeddingRef)
    with contextlib.suppress(ProtocolError):
        return decode(data, EmbeddingClaim)
    return decode(data, EmbeddingDivision)


async def open_index(
    bus: Bus, directory: WorkerDirectory, cancellations: Cancellations
) -> EmbeddingIndex:
    """A worker's view of the index; `directory` is followed together with it."""
    return EmbeddingIndex(
        await bus.key_value(subjects.EMBEDDINGS_BUCKET, ttl_s=subjects.EMBEDDINGS_TTL_S),
        is_gone=directory.is_gone,
        is_cancelled=cancellations.is_cancelled,
        within=directory,
    )
