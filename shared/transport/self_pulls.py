"""Pulls of what this very process exposes: one copy in memory, and no message.

In: an owner's exposures and what is asked of them. Out: bytes in the caller's memory, or a
`TransferError`. Leases mean here what they mean between processes: the same refusals, the memory
held while it is read, landing memory untouched once the pull is over. Both transports use it.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from shared.clock import Clock
from shared.errors import Outcome, TransferError
from shared.messages.descriptor import WorkerRef
from shared.messages.refs import TensorRef
from shared.transport.base import Buffer, Segment
from shared.transport.buffers import host_bytes, is_on_device
from shared.transport.exposures import Asked, Exposures


@dataclass(eq=False)
class _Copy:
    """One pull. `landing` is None once the pull is over: nothing is written any more."""

    segment: Segment
    lease_id: str
    landing: Buffer | None


class SelfPulls:
    """One process' way to its own exposed memory, as far as that is host memory."""

    def __init__(
        self, me: WorkerRef, exposures: Exposures, *, clock: Clock = time.monotonic
    ) -> None:
        self._me = me
        self._exposures = exposures
        self._clock = clock
        self._tasks: set[asyncio.Task[bool]] = set()
        self.bytes_copied = 0
        self.num_failed = 0

    async def pull(
        self, ref: TensorRef, segment: int, landing: Buffer, *, timeout_s: float
    ) -> bool:
        """Copy one segment. False where the memory is another process' or a GPU's.

        Raises `TransferError`, or `CancelledError` if its task was cancelled.
        """
        if ref.owner != self._me or is_on_device(landing):
            return False
        try:
            asked = asked_for(ref, segment)
            exposed = self._exposures.begin_send(asked, self._clock())
            await self._exposures.until_ready(
                asked, exposed, timeout_s=timeout_s / 2, clock=self._clock
            )
            copied = await self._copied(_Copy(exposed, ref.lease_id, landing), timeout_s)
        except BaseException:
            self.num_failed += 1
            raise
        if copied:
            self.bytes_copied += exposed.num_bytes
        return copied

    async def settle(self) -> None:
        """Wait for segments that are still being opened for pulls that are over."""
        self._exposures.stop_waiting()
        if self._tasks:
            await asyncio.wait(tuple(self._tasks))

    async def _copied(self, copy: _Copy, timeout_s: float) -> bool:
        if copy.segment.is_instant:
            return await self._copy(copy)
        task = asyncio.create_task(self._copy(copy), name=f"copy-{copy.lease_id}")
        self._tasks.add(task)
        task.add_done_callback(self._on_done)
        try:
            # Not cancelled with the pull: the memory is read until its thread is done.
            done, _ = await asyncio.wait((task,), timeout=timeout_s)
        finally:
            copy.landing = None
        if not done:
            raise TransferError(Outcome.INTERNAL, f"nothing came within {timeout_s} s")
        return task.result()

    async def _copy(self, copy: _Copy) -> bool:
        """Open the segment, copy it if it is still wanted, and let go of the lease."""
        segment = copy.segment
        try:
            ready = segment.is_instant
            buffer = segment.open() if ready else await asyncio.to_thread(segment.open)
            if copy.landing is None or is_on_device(buffer):
                return False
            source = host_bytes(buffer)
            if source.nbytes != segment.num_bytes:
                raise ValueError(
                    f"a segment of {segment.num_bytes} bytes opened as {source.nbytes}"
                )
            host_bytes(copy.landing)[:] = source
            return True
        except TransferError:
            raise
        except Exception as error:
            raise TransferError(Outcome.INTERNAL, f"{error}") from error
        finally:
            self._exposures.end_send(copy.lease_id)

    def _on_done(self, task: asyncio.Task[bool]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # marks it as seen: whoever gave up does not ask


def asked_for(ref: TensorRef, segment: int) -> Asked:
    """What a receiver that holds this reference believes it is about to read."""
    return Asked(
        owner=ref.owner,
        compatibility=ref.compatibility,
        lease_id=ref.lease_id,
        segment=segment,
        num_bytes=ref.segment_bytes[segment],
    )
