"""The data plane within one process: the in-memory twin of the UCX transport.

In and out as there: leases, typed outcomes, deadlines, all-or-nothing delivery. A `LoopbackNetwork`
joins the transports that can reach each other. Bytes are copied at once, so nothing is ever left in
quarantine. Knows no GPU memory.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType

from shared.clock import Clock
from shared.errors import Outcome, TransferError
from shared.messages.descriptor import WorkerRef
from shared.messages.refs import TensorRef
from shared.transport.base import Buffer, Segment, TransportCounters
from shared.transport.buffers import ByteArray, checked_landing, host_bytes
from shared.transport.exposures import Asked, Exposures
from shared.transport.lease import LEASE_S
from shared.transport.self_pulls import SelfPulls, asked_for

TICK_S = 0.25


@dataclass(frozen=True, eq=False)
class _Delivery:
    """One pull as the owner sees it."""

    asked: Asked
    landing: ByteArray
    timeout_s: float
    arrived: asyncio.Future[None]

    def fail(self, outcome: Outcome, detail: str) -> None:
        """End it without its bytes, unless it ended before."""
        if not self.arrived.done():
            self.arrived.set_exception(TransferError(outcome, detail))


class LoopbackNetwork:
    """Who listens at which address."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._listening: dict[bytes, LoopbackTransport] = {}
        self._newest: dict[str, int] = {}

    def attach(self, transport: LoopbackTransport) -> bytes:
        """Give a transport its address."""
        address = b"loopback:%d" % next(self._numbers)
        self._listening[address] = transport
        self.meet(transport.me)
        return address

    def detach(self, address: bytes) -> None:
        """Nobody listens here any more."""
        self._listening.pop(address, None)

    def find(self, owner: WorkerRef, address: bytes) -> LoopbackTransport:
        """Who listens at an address. Raises `TransferError`."""
        newest = self._newest.get(owner.name, owner.incarnation)
        if newest > owner.incarnation:
            raise TransferError(
                Outcome.VERSION, f"{owner.name}#{owner.incarnation} was replaced by #{newest}"
            )
        transport = self._listening.get(address)
        if transport is None:
            raise TransferError(Outcome.INTERNAL, f"{owner.name} cannot be reached")
        return transport

    def meet(self, worker: WorkerRef) -> None:
        """Remember the newest life of a worker."""
        known = self._newest.get(worker.name, -1)
        self._newest[worker.name] = max(known, worker.incarnation)


class LoopbackTransport:
    """One worker's access to a loopback network."""

    def __init__(
        self,
        network: LoopbackNetwork,
        me: WorkerRef,
        compatibility: str,
        *,
        lease_s: float = LEASE_S,
        clock: Clock = time.monotonic,
    ) -> None:
        self.me = me
        self._network = network
        self._compatibility = compatibility
        self._clock = clock
        self._exposures = Exposures(me, compatibility, lease_s=lease_s)
        self._self_pulls = SelfPulls(me, self._exposures, clock=clock)
        self._address = b""
        self._deliveries: dict[asyncio.Task[None], _Delivery] = {}
        self._bytes_sent = self._num_sent = 0
        self._bytes_received = self._num_received = self._num_failed = 0

    async def __aenter__(self) -> LoopbackTransport:
        self._address = self._network.attach(self)
        self._timer = asyncio.get_running_loop().call_later(TICK_S, self._tick)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._timer.cancel()
        self._network.detach(self._address)
        self._address = b""
        for delivery in self._deliveries.values():
            delivery.fail(Outcome.CANCELLED, f"{self.me.name} stops")
        self._exposures.stop_waiting()
        if self._deliveries:
            await asyncio.wait(tuple(self._deliveries))
        await self._self_pulls.settle()
        self._exposures.revoke_all()

    def expose(
        self,
        lease_id: str,
        segments: Iterable[Segment],
        *,
        holders: Iterable[str],
        on_release: Callable[[], None],
    ) -> TensorRef:
        """Offer memory under a new lease; see `Transport.expose`."""
        return self._exposures.open(
            lease_id,
            segments,
            holders=holders,
            on_release=on_release,
            address=self._address,
            now=self._clock(),
        )

    def extend(self, holders: Iterable[str]) -> None:
        """Push the expiry of every lease that one of these requests holds."""
        self._exposures.extend(holders, self._clock())

    def drop(self, holder: str) -> None:
        """Release all that one request still holds."""
        self._exposures.drop(holder)

    def revoke(self, lease_id: str) -> None:
        """Take an exposure back."""
        self._exposures.revoke(lease_id)

    async def pull(self, ref: TensorRef, segment: int, into: Buffer, *, timeout_s: float) -> None:
        """Receive one segment; see `Transport.pull`."""
        landing = checked_landing(ref, segment, into)
        self._check(ref)
        if await self._self_pulls.pull(ref, segment, landing, timeout_s=timeout_s):
            return
        try:
            await self._pull(ref, segment, landing, timeout_s)
        except BaseException:
            self._num_failed += 1
            raise
        self._num_received += 1
        self._bytes_received += ref.segment_bytes[segment]

    async def release(self, ref: TensorRef, holder: str) -> None:
        """Tell the owner that one holder is done."""
        try:
            owner = self._network.find(ref.owner, ref.address)
        except TransferError:
            return  # the owner is gone, and its memory with it
        if owner.me == ref.owner:
            owner._exposures.release(ref.lease_id, holder)

    def watch_quarantine(self, callback: Callable[[int], None]) -> None:
        """Nothing is ever in quarantine here."""

    def counters(self) -> TransportCounters:
        """Totals since start, and what is open now."""
        return TransportCounters(
            bytes_sent=self._bytes_sent,
            bytes_received=self._bytes_received,
            bytes_local=self._self_pulls.bytes_copied,
            transfers_sent=self._num_sent,
            transfers_received=self._num_received,
            transfers_failed=self._num_failed + self._self_pulls.num_failed,
            leases_open=self._exposures.num_open,
            leases_expired=self._exposures.num_expired,
            quarantined_bytes=0,
        )

    def _check(self, ref: TensorRef) -> None:
        if not self._address:
            raise TransferError(Outcome.CANCELLED, "the transport is closed")
        if ref.compatibility != self._compatibility:
            raise TransferError(
                Outcome.INCOMPATIBLE,
                f"{ref.owner.name} has {ref.compatibility}, this is {self._compatibility}",
            )

    async def _pull(self, ref: TensorRef, segment: int, landing: Buffer, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        owner = self._network.find(ref.owner, ref.address)
        delivery = _Delivery(
            asked_for(ref, segment), host_bytes(landing), timeout_s, loop.create_future()
        )
        detail = f"nothing came within {timeout_s} s"
        timer = loop.call_later(timeout_s, delivery.fail, Outcome.INTERNAL, detail)
        owner._start(delivery)
        try:
            await delivery.arrived
        finally:
            timer.cancel()
            delivery.arrived.cancel()

    def _start(self, delivery: _Delivery) -> None:
        task = asyncio.create_task(self._deliver(delivery), name="loopback-delivery")
        self._deliveries[task] = delivery
        task.add_done_callback(self._deliveries.pop)

    async def _deliver(self, delivery: _Delivery) -> None:
        try:
            segment = self._exposures.begin_send(delivery.asked, self._clock())
        except TransferError as refusal:
            delivery.fail(refusal.outcome, refusal.detail)
            return
        try:
            await self._exposures.until_ready(
                delivery.asked, segment, timeout_s=delivery.timeout_s / 2, clock=self._clock
            )
            try:
                await self._copy(delivery, segment)
            finally:
                self._exposures.end_send(delivery.asked.lease_id)
        except TransferError as refusal:
            delivery.fail(refusal.outcome, refusal.detail)
        except Exception as error:
            delivery.fail(Outcome.INTERNAL, f"{error}")

    async def _copy(self, delivery: _Delivery, segment: Segment) -> None:
        buffer = await _open(segment)
        if not delivery.arrived.done():
            delivery.landing[:] = buffer
            delivery.arrived.set_result(None)
            self._num_sent += 1
            self._bytes_sent += segment.num_bytes

    def _tick(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(TICK_S, self._tick)
        self._exposures.expire(self._clock())


async def _open(segment: Segment) -> ByteArray:
    buffer = segment.open() if segment.is_instant else await asyncio.to_thread(segment.open)
    view = host_bytes(buffer)
    if view.nbytes != segment.num_bytes:
        raise ValueError(f"a segment of {segment.num_bytes} bytes opened as {view.nbytes}")
    return view
