"""A bounded store of byte strings with a lifetime, over the JetStream object store.

Writes the object store's own format (chunks under a fresh id, then the metadata message), so that
any NATS client can list and read it. Reading asks for all chunks at once by the sequence numbers
that the metadata carries: two round trips, where a client that knows only the format needs a
consumer.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import time
import uuid
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

import nats.errors
from nats.js import JetStreamContext, api

from shared.bus.limits import BusLimits
from shared.bus.nats_errors import is_missing, translated
from shared.bus.nats_streams import ensure_stream
from shared.errors import BusError, ObjectMissing

# Chunks on the wire at once, each way; bounds what one transfer makes server and client buffer.
_WINDOW_CHUNKS = 16
# Hashing more than this would hold up the event loop for over a millisecond.
_HASH_INLINE_BYTES = 1024 * 1024
_SEQUENCES = "triptych-chunk-sequences"

T = TypeVar("T")


@dataclass(frozen=True)
class StoredObject:
    """What the metadata message says, and how old it is by the server's clock."""

    nuid: str
    num_bytes: int
    chunk_sequences: tuple[int, ...]
    age_s: float


class NatsObjectStore:
    """See `shared.bus.base.ObjectStore`. Names are content keys: same name, same bytes."""

    def __init__(
        self,
        jetstream: JetStreamContext,
        bucket: str,
        ttl_s: float,
        max_bytes: int,
        limits: BusLimits,
    ) -> None:
        self._jetstream = jetstream
        self._bucket = bucket
        self._stream = f"OBJ_{bucket}"
        self._ttl_s = ttl_s
        self._max_bytes = max_bytes
        self._limits = limits

    async def open(self) -> None:
        """Make the bucket if it does not exist."""
        await ensure_stream(
            self._jetstream,
            api.StreamConfig(
                name=self._stream,
                subjects=[f"$O.{self._bucket}.C.>", f"$O.{self._bucket}.M.>"],
                max_age=self._ttl_s,
                max_bytes=self._max_bytes,
                duplicate_window=min(self._ttl_s, self._limits.duplicate_window_s),
                storage=api.StorageType(self._limits.storage.value),
                discard=api.DiscardPolicy.NEW,
                allow_rollup_hdrs=True,
                allow_direct=True,
            ),
        )

    async def put(self, name: str, data: bytes) -> None:
        before = await self._stored(name)
        if before is not None and before.age_s <= self._ttl_s / 2:
            return
        nuid = uuid.uuid4().hex
        with translated(f"put {name} in {self._bucket} ({len(data)} bytes)"):
            try:
                sequences = await self._write_chunks(nuid, data)
                await self._write_metadata(name, nuid, data, sequences)
            except (nats.errors.Error, asyncio.CancelledError):
                await asyncio.shield(self._purge(nuid))
                raise
            if before is not None:
                await self._purge(before.nuid)

    async def get(self, name: str) -> bytes:
        stored = await self._stored(name)
        if stored is None:
            raise ObjectMissing(f"{name} is not in {self._bucket}")
        data = await self._read_chunks(stored)
        if data is None:
            # Renewed between the two round trips: the new metadata names the new chunks.
            stored = await self._stored(name)
            data = await self._read_chunks(stored) if stored is not None else None
        if data is None:
            raise ObjectMissing(f"{name} expired from {self._bucket}")
        return data

    async def reconnected(self) -> None:
        """A restarted server may have forgotten a bucket kept in memory."""
        await self.open()

    async def close(self) -> None:
        """Nothing is held."""

    async def _stored(self, name: str) -> StoredObject | None:
        with translated(f"look up {name} in {self._bucket}"):
            try:
                raw = await self._jetstream.get_last_msg(
                    self._stream, self._meta_subject(name), direct=True
                )
            except nats.errors.Error as error:
                if is_missing(error):
                    return None
                raise
        fields = json.loads(raw.data or b"{}")
        if fields.get("deleted"):
            return None
        sequences = fields.get("metadata", {}).get(_SEQUENCES, "")
        return StoredObject(
            nuid=fields["nuid"],
            num_bytes=fields["size"],
            chunk_sequences=tuple(int(s) for s in sequences.split(",") if s),
            age_s=time.time() - raw.time.timestamp() if raw.time else 0.0,
        )

    async def _write_chunks(self, nuid: str, data: bytes) -> list[int]:
        size = self._limits.object_chunk_bytes
        chunks = [data[i : i + size] for i in range(0, len(data), size)]
        sequences: list[int] = []
        for start in range(0, len(chunks), _WINDOW_CHUNKS):
            acks = await _all(
                self._jetstream.publish(self._chunk_subject(nuid), chunk)
                for chunk in chunks[start : start + _WINDOW_CHUNKS]
            )
            sequences.extend(ack.seq for ack in acks)
        return sequences

    async def _write_metadata(
        self, name: str, nuid: str, data: bytes, sequences: list[int]
    ) -> None:
        digest = base64.urlsafe_b64encode(await _sha256(data)).decode()
        fields: dict[str, Any] = {
            "name": name,
            "bucket": self._bucket,
            "nuid": nuid,
            "size": len(data),
            "chunks": len(sequences),
            "digest": f"SHA-256={digest}",
            "mtime": datetime.now(UTC).isoformat(),
            "options": {"max_chunk_size": self._limits.object_chunk_bytes},
            "metadata": {_SEQUENCES: ",".join(map(str, sequences))},
        }
        await self._jetstream.publish(
            self._meta_subject(name), json.dumps(fields).encode(), headers={"Nats-Rollup": "sub"}
        )

    async def _read_chunks(self, stored: StoredObject) -> bytes | None:
        """All bytes, or None if a chunk is no longer there."""
        parts: list[bytes] = []
        with translated(f"read {stored.num_bytes} bytes from {self._bucket}"):
            for start in range(0, len(stored.chunk_sequences), _WINDOW_CHUNKS):
                window = stored.chunk_sequences[start : start + _WINDOW_CHUNKS]
                try:
                    parts.extend(await _all(self._chunk(s) for s in window))
                except nats.errors.Error as error:
                    if is_missing(error):
                        return None
                    raise
        data = b"".join(parts)
        if len(data) != stored.num_bytes:
            raise BusError(f"object of {stored.num_bytes} bytes in {self._bucket} has {len(data)}")
        return data

    async def _chunk(self, sequence: int) -> bytes:
        raw = await self._jetstream.get_msg(self._stream, seq=sequence, direct=True)
        return raw.data or b""

    async def _purge(self, nuid: str) -> None:
        await self._jetstream.purge_stream(self._stream, subject=self._chunk_subject(nuid))

    def _chunk_subject(self, nuid: str) -> str:
        return f"$O.{self._bucket}.C.{nuid}"

    def _meta_subject(self, name: str) -> str:
        return f"$O.{self._bucket}.M.{base64.urlsafe_b64encode(name.encode()).decode()}"


async def _sha256(data: bytes) -> bytes:
    if len(data) <= _HASH_INLINE_BYTES:
        return hashlib.sha256(data).digest()
    return await asyncio.to_thread(lambda: hashlib.sha256(data).digest())


async def _all(work: Iterable[Awaitable[T]]) -> list[T]:
    """Run all to their end, then raise the first error: a chunk still on its way when the others
    are purged would stay behind."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]
