"""The receiver's side over UCX: pulls under way, and what becomes of those that were given up.

In: requests to pull with a deadline. Out: bytes in the caller's memory, or a `TransferError`. Knows
nothing of leases.

A pull waits for the owner's header first and offers its landing memory only then, so giving up
before the header leaves that memory untouched. Giving up later leaves it in quarantine: the
transport sends one byte to itself under the pull's tag, which ends a receive that no message had
matched; one that had been matched ends when UCX is done. Replies to pulls that nobody awaits any
more are taken off UCX's hands as soon as they are seen, so that their owner can free.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from shared.errors import Outcome, TransferError
from shared.messages.descriptor import WorkerRef
from shared.messages.refs import TensorRef
from shared.transport import wire
from shared.transport.base import Buffer
from shared.transport.ucx_peers import UcxPeers
from shared.transport.ucx_worker import Endpoint, Operation, UcxWorker


@dataclass(eq=False)
class _Pull:
    """One segment on its way. `landing` is None once it is nobody's concern any more."""

    number: int
    landing: Buffer
    num_bytes: int
    deadline_s: float
    endpoint: Endpoint
    arrived: asyncio.Future[None]
    header: bytearray = field(default_factory=lambda: bytearray(wire.HEADER_BYTES))
    header_receive: Operation | None = None
    data_receive: Operation | None = None


class UcxPulls:
    """All pulls of one process. `me` and `address` tell owners where to send."""

    def __init__(self, me: WorkerRef, worker: UcxWorker, peers: UcxPeers) -> None:
        self._me = me
        self._worker = worker
        self._peers = peers
        self._numbers = itertools.count(1)
        self._pulls: dict[int, _Pull] = {}
        self._quarantined: dict[int, _Pull] = {}
        self._myself: Endpoint = None
        self._may_have_stale_replies = False
        self.on_quarantine: list[Callable[[int], None]] = []
        self.bytes_received = 0
        self.num_received = 0
        self.num_failed = 0

    @property
    def quarantined_bytes(self) -> int:
        """Landing memory that UCX may still write to though its pull has failed."""
        return sum(pull.num_bytes for pull in self._quarantined.values())

    async def pull(
        self, ref: TensorRef, segment: int, landing: Buffer, *, timeout_s: float
    ) -> None:
        """Receive one segment. Raises `TransferError`, or `CancelledError` if its task was."""
        try:
            await self._pull(ref, segment, landing, timeout_s)
        except BaseException:
            self.num_failed += 1
            raise
        self.num_received += 1
        self.bytes_received += ref.segment_bytes[segment]

    async def _pull(self, ref: TensorRef, segment: int, landing: Buffer, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        pull = _Pull(
            number=next(self._numbers),
            landing=landing,
            num_bytes=ref.segment_bytes[segment],
            deadline_s=time.monotonic() + timeout_s,
            endpoint=self._peers.endpoint(ref.owner, ref.address),
            arrived=loop.create_future(),
        )
        timer = loop.call_later(timeout_s, self._fail, pull, f"nothing came within {timeout_s} s")
        self._pulls[pull.number] = pull
        try:
            self._ask(pull, ref, segment, timeout_s)
            await pull.arrived
        finally:
            timer.cancel()
            del self._pulls[pull.number]
            self._give_up(pull)

    def stop(self) -> None:
        """Fail everything under way."""
        for pull in self._pulls.values():
            _fail(pull, Outcome.CANCELLED, "the transport stops")

    def close(self) -> None:
        """Let go of the endpoint to oneself."""
        if self._myself is not None:
            self._worker.disconnect(self._myself)
            self._myself = None

    def sweep(self) -> bool:
        """Take one reply that nobody awaits off UCX's hands. Returns whether there was one."""
        if not self._may_have_stale_replies:
            return False
        for kind in (wire.HEADER_TAG, wire.DATA_TAG):
            reply = self._worker.peek(kind, wire.KIND_MASK)
            if reply is not None and reply.tag & wire.PULL_MASK not in self._pulls:
                # Cut short to one byte, so that nothing of it is copied; its sender is done then.
                self._worker.receive(bytearray(1), reply.tag, _ignore)
                return True
        return False

    def _ask(self, pull: _Pull, ref: TensorRef, segment: int, timeout_s: float) -> None:
        request = wire.PullRequest(
            number=pull.number,
            sender=self._me,
            address=self._worker.address,
            owner=ref.owner,
            compatibility=ref.compatibility,
            lease_id=ref.lease_id,
            segment=segment,
            num_bytes=pull.num_bytes,
            timeout_s=timeout_s,
        )
        pull.header_receive = self._worker.receive(
            pull.header,
            wire.HEADER_TAG | pull.number,
            lambda error: self._on_header(pull, error),
            endpoint=pull.endpoint,
        )
        self._worker.send(
            pull.endpoint,
            wire.encode_control(request),
            wire.CONTROL_TAG,
            lambda error: (
                _fail(pull, Outcome.INTERNAL, f"request not sent: {error}") if error else None
            ),
        )

    def _on_header(self, pull: _Pull, error: Exception | None) -> None:
        pull.header_receive = None
        if pull.arrived.done():
            return
        if error is not None:
            _fail(pull, Outcome.INTERNAL, f"the owner is gone: {error}")
            return
        try:
            wire.check_header(bytes(pull.header), pull.num_bytes)
        except TransferError as refusal:
            pull.arrived.set_exception(refusal)
            return
        pull.data_receive = self._worker.receive(
            pull.landing,
            wire.DATA_TAG | pull.number,
            lambda error: self._on_data(pull, error),
            endpoint=pull.endpoint,
        )

    def _on_data(self, pull: _Pull, error: Exception | None) -> None:
        pull.data_receive = None
        if self._quarantined.pop(pull.number, None) is not None:
            self._tell_quarantine()
        if pull.arrived.done():
            return
        if error is not None:
            _fail(pull, Outcome.INTERNAL, f"the transfer broke off: {error}")
        elif time.monotonic() > pull.deadline_s:
            # The owner may have reused the memory by now: these bytes prove nothing.
            _fail(pull, Outcome.INTERNAL, "the bytes came after the deadline")
        else:
            pull.arrived.set_result(None)

    def _fail(self, pull: _Pull, detail: str) -> None:
        _fail(pull, Outcome.INTERNAL, detail)

    def _give_up(self, pull: _Pull) -> None:
        """Settle what a pull that ended without its bytes left open."""
        pull.arrived.cancel()
        if pull.header_receive is not None:
            self._worker.forget(pull.header_receive)
            self._may_have_stale_replies = True
            self._send_notice(pull)
        if pull.data_receive is not None:
            self._quarantined[pull.number] = pull
            self._may_have_stale_replies = True
            self._tell_quarantine()
            self._end_unmatched_receive(pull)

    def _send_notice(self, pull: _Pull) -> None:
        notice = wire.AbandonNotice(number=pull.number, sender=self._me)
        self._worker.send(pull.endpoint, wire.encode_control(notice), wire.CONTROL_TAG, _ignore)

    def _end_unmatched_receive(self, pull: _Pull) -> None:
        if self._myself is None:
            self._myself = self._worker.connect(self._worker.address)
        self._worker.send(self._myself, b"\0", wire.DATA_TAG | pull.number, _ignore)

    def _tell_quarantine(self) -> None:
        for callback in self.on_quarantine:
            callback(self.quarantined_bytes)


def _fail(pull: _Pull, outcome: Outcome, detail: str) -> None:
    if not pull.arrived.done():
        pull.arrived.set_exception(TransferError(outcome, detail))


def _ignore(_error: Exception | None) -> None:
    """Whether this small message went through is not worth knowing."""
