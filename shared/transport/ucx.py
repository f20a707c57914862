"""The data plane over UCX: shared memory on one host, InfiniBand or TCP between hosts.

In: exposures and pulls of this process' stage. Out: bytes in the receiver's memory. Knows nothing
of what the bytes mean. A receiver sends a small request to the owner, who answers with a typed
header and the bytes (`wire`). Everything runs on one event loop, which sleeps when nothing moves.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType

from shared.errors import Outcome, TransferError
from shared.messages.descriptor import WorkerRef
from shared.messages.refs import TensorRef
from shared.transport import wire
from shared.transport.base import Buffer, Segment, TransportCounters
from shared.transport.buffers import checked_landing
from shared.transport.exposures import Exposures
from shared.transport.lease import LEASE_S
from shared.transport.self_pulls import SelfPulls
from shared.transport.ucx_peers import UcxPeers
from shared.transport.ucx_pulls import UcxPulls
from shared.transport.ucx_sends import UcxSends
from shared.transport.ucx_worker import UcxWorker

TICK_S = 0.25
"""How often leases are looked at, and UCX too, should an event of it have gone by unseen."""

CLOSE_TIMEOUT_S = 1.0


class UcxTransport:
    """One process' access to the data plane over UCX.

    `error_handling` lets a dead peer be noticed and its transfers fail at once; without it UCX
    aborts this process when a peer dies while its memory is being read. All workers must agree on
    it: UCX refuses to connect two that differ, and their pulls end with their deadline. `config`
    holds UCX options without their `UCX_` prefix; the environment wins over it.
    """

    def __init__(
        self,
        me: WorkerRef,
        compatibility: str,
        *,
        lease_s: float = LEASE_S,
        error_handling: bool = True,
        config: Mapping[str, str] | None = None,
    ) -> None:
        self._me = me
        self._compatibility = compatibility
        self._error_handling = error_handling
        self._config = config
        self._exposures = Exposures(me, compatibility, lease_s=lease_s)
        self._self_pulls = SelfPulls(me, self._exposures)
        self._is_open = False

    async def __aenter__(self) -> UcxTransport:
        self._loop = asyncio.get_running_loop()
        self._worker = UcxWorker(
            self._on_progress, error_handling=self._error_handling, config=self._config
        )
        self._peers = UcxPeers(self._worker)
        self._pulls = UcxPulls(self._me, self._worker, self._peers)
        self._sends = UcxSends(self._me, self._worker, self._peers, self._exposures)
        self._is_open = True
        self._timer = self._loop.call_later(TICK_S, self._tick)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_open = False
        self._timer.cancel()
        self._pulls.stop()
        try:
            await self._sends.stop()
            await self._self_pulls.settle()
            self._exposures.revoke_all()
            self._pulls.close()
            self._peers.close()
            await self._settle()
        finally:
            self._worker.close()

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
            address=self._worker.address,
            now=time.monotonic(),
        )

    def extend(self, holders: Iterable[str]) -> None:
        """Push the expiry of every lease that one of these requests holds."""
        self._exposures.extend(holders, time.monotonic())

    def drop(self, holder: str) -> None:
        """Release all that one request still holds."""
        self._exposures.drop(holder)

    def revoke(self, lease_id: str) -> None:
        """Take an exposure back."""
        self._exposures.revoke(lease_id)

    async def pull(self, ref: TensorRef, segment: int, into: Buffer, *, timeout_s: float) -> None:
        """Receive one segment; see `Transport.pull`."""
        landing = checked_landing(ref, segment, into)
        if not self._is_open:
            raise TransferError(Outcome.CANCELLED, "the transport is closed")
        if ref.compatibility != self._compatibility:
            raise TransferError(
                Outcome.INCOMPATIBLE,
                f"{ref.owner.name} has {ref.compatibility}, this is {self._compatibility}",
            )
        if not await self._self_pulls.pull(ref, segment, landing, timeout_s=timeout_s):
            await self._pulls.pull(ref, segment, landing, timeout_s=timeout_s)

    async def release(self, ref: TensorRef, holder: str) -> None:
        """Tell the owner that one holder is done; a lost message is mended by expiry."""
        if ref.owner == self._me:
            self._exposures.release(ref.lease_id, holder)
            return
        try:
            endpoint = self._peers.endpoint(ref.owner, ref.address)
        except TransferError:
            return  # the owner is gone, and its memory with it
        notice = wire.ReleaseNotice(owner=ref.owner, lease_id=ref.lease_id, holder=holder)
        self._worker.send(endpoint, wire.encode_control(notice), wire.CONTROL_TAG, _ignore)

    def watch_quarantine(self, callback: Callable[[int], None]) -> None:
        """Call back with the bytes in quarantine whenever they change."""
        self._pulls.on_quarantine.append(callback)

    def counters(self) -> TransportCounters:
        """Totals since start, and what is open now."""
        return TransportCounters(
            bytes_sent=self._sends.bytes_sent,
            bytes_received=self._pulls.bytes_received,
            bytes_local=self._self_pulls.bytes_copied,
            transfers_sent=self._sends.num_sent,
            transfers_received=self._pulls.num_received,
            transfers_failed=self._pulls.num_failed + self._self_pulls.num_failed,
            leases_open=self._exposures.num_open,
            leases_expired=self._exposures.num_expired,
            quarantined_bytes=self._pulls.quarantined_bytes,
        )

    @property
    def num_connected(self) -> int:
        """Endpoints made since start."""
        return self._peers.num_connected

    @property
    def num_sending(self) -> int:
        """Segments that receivers asked for and that are not done."""
        return self._sends.num_sending

    def _on_progress(self) -> bool:
        return self._sends.take_control() or self._pulls.sweep()

    def _tick(self) -> None:
        self._timer = self._loop.call_later(TICK_S, self._tick)
        self._exposures.expire(time.monotonic())
        self._worker.kick()

    async def _settle(self) -> None:
        """Give notices and disconnections a moment to leave; a dead peer must not hold us up."""
        until = time.monotonic() + CLOSE_TIMEOUT_S
        while self._worker.num_pending and time.monotonic() < until:
            self._worker.kick()
            await asyncio.sleep(0.001)


def _ignore(_error: Exception | None) -> None:
    """A lost release is mended by expiry."""
