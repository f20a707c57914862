"""The owner's side over UCX: control messages in, headers and segments out.

In: pull requests, abandonments and releases of receivers. Out: typed refusals or bytes. Knows
nothing of what the memory holds. A send holds its lease from its admission until UCX is done with
the memory, or until the receiver is so far past its deadline that it would refuse the bytes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from shared.errors import Outcome, ProtocolError, TransferError
from shared.messages.descriptor import WorkerRef
from shared.transport import wire
from shared.transport.base import Buffer, Segment
from shared.transport.buffers import num_bytes_of
from shared.transport.exposures import Asked, Exposures
from shared.transport.ucx_peers import UcxPeers
from shared.transport.ucx_worker import Endpoint, UcxWorker

logger = logging.getLogger(__name__)

NUM_OPENERS = 2
"""Threads that gather segments: enough that one large segment does not hold up a small one."""

GRACE_S = 1.0
"""How long after a receiver's deadline its segment is still held; clocks are not exact."""


@dataclass(eq=False)
class _Send:
    request: wire.PullRequest
    endpoint: Endpoint
    deadline_s: float
    sent: asyncio.Future[None]
    is_abandoned: bool = False


class UcxSends:
    """Everything that receivers asked this process for."""

    def __init__(
        self, me: WorkerRef, worker: UcxWorker, peers: UcxPeers, exposures: Exposures
    ) -> None:
        self._me = me
        self._worker = worker
        self._peers = peers
        self._exposures = exposures
        self._sends: dict[tuple[str, int, int], _Send] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._openers = ThreadPoolExecutor(NUM_OPENERS, thread_name_prefix="open-segment")
        self._is_stopping = False
        self.bytes_sent = 0
        self.num_sent = 0
        self.num_malformed = 0

    @property
    def num_sending(self) -> int:
        """Sends that hold a lease, or wait for what it exposes."""
        return len(self._sends)

    def take_control(self) -> bool:
        """Take one control message that arrived. Returns whether there was one."""
        arrival = self._worker.peek(wire.CONTROL_TAG, wire.EVERY_BIT)
        if arrival is None:
            return False
        # An oversized message is cut short to one byte and ends with an error.
        fits = 0 < arrival.num_bytes <= wire.MAX_CONTROL_BYTES
        buffer = bytearray(arrival.num_bytes if fits else 1)
        self._worker.receive(
            buffer, wire.CONTROL_TAG, lambda error: self._on_control(bytes(buffer), error)
        )
        return True

    async def stop(self) -> None:
        """Refuse what comes, wait for what is being read, free the threads."""
        self._is_stopping = True
        for send in self._sends.values():
            send.is_abandoned = True
        self._exposures.stop_waiting()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=GRACE_S)
        for send in self._sends.values():
            send.sent.cancel()
        # Not cancelled themselves: the memory is theirs until the thread that opens it is done.
        await asyncio.gather(*self._tasks)
        await asyncio.to_thread(self._openers.shutdown, cancel_futures=True)

    def _on_control(self, data: bytes, error: Exception | None) -> None:
        try:
            if error is not None:
                raise ProtocolError(str(error))
            message = wire.decode_control(data)
        except ProtocolError as malformed:
            self.num_malformed += 1
            logger.warning("control message dropped: %s", malformed)
            return
        match message:
            case wire.PullRequest():
                self._on_pull(message)
            case wire.AbandonNotice():
                send = self._sends.get(_key(message))
                if send is not None:
                    send.is_abandoned = True
            case wire.ReleaseNotice():
                if message.owner == self._me:
                    self._exposures.release(message.lease_id, message.holder)
            case wire.ForeignRequest():
                detail = f"version {message.version} was asked, this is {wire.PROTOCOL_VERSION}"
                self._refuse(message, TransferError(Outcome.VERSION, detail))

    def _on_pull(self, request: wire.PullRequest) -> None:
        now = time.monotonic()
        asked = Asked(
            owner=request.owner,
            compatibility=request.compatibility,
            lease_id=request.lease_id,
            segment=request.segment,
            num_bytes=request.num_bytes,
        )
        try:
            if self._is_stopping:
                raise TransferError(Outcome.CANCELLED, f"{self._me.name} stops")
            endpoint = self._peers.endpoint(request.sender, request.address)
            segment = self._exposures.begin_send(asked, now)
        except TransferError as refusal:
            self._refuse(request, refusal)
            return
        sent = asyncio.get_running_loop().create_future()
        send = _Send(request, endpoint, now + request.timeout_s, sent)
        self._sends[_key(request)] = send
        task = asyncio.create_task(
            self._serve(send, asked, segment), name=f"send-{request.lease_id}"
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, send: _Send, asked: Asked, segment: Segment) -> None:
        request = send.request
        try:
            await self._exposures.until_ready(
                asked, segment, timeout_s=request.timeout_s / 2, clock=time.monotonic
            )
            try:
                buffer = await self._open(segment)
                if not send.is_abandoned and time.monotonic() < send.deadline_s:
                    await self._send(send, buffer)
            finally:
                self._exposures.end_send(request.lease_id)
        except TransferError as refusal:
            self._refuse(request, refusal)
        except Exception as error:
            logger.warning("send of lease %s failed: %s", request.lease_id, error)
            self._refuse(request, TransferError(Outcome.INTERNAL, f"{error}"))
        finally:
            self._sends.pop(_key(request), None)

    async def _open(self, segment: Segment) -> Buffer:
        if segment.is_instant:
            buffer = segment.open()
        else:
            loop = asyncio.get_running_loop()
            buffer = await loop.run_in_executor(self._openers, segment.open)
        if num_bytes_of(buffer) != segment.num_bytes:
            raise ValueError(
                f"a segment of {segment.num_bytes} bytes opened as {num_bytes_of(buffer)}"
            )
        return buffer

    async def _send(self, send: _Send, buffer: Buffer) -> None:
        number, num_bytes = send.request.number, send.request.num_bytes
        header = wire.encode_header(num_bytes)
        self._worker.send(send.endpoint, header, wire.HEADER_TAG | number, _ignore)
        self._worker.send(
            send.endpoint, buffer, wire.DATA_TAG | number, lambda error: _end(send.sent, error)
        )
        patience_s = send.deadline_s - time.monotonic() + GRACE_S
        done, _ = await asyncio.wait((send.sent,), timeout=patience_s)
        if not done:
            send.sent.cancel()
            logger.info("lease %s was not read in time", send.request.lease_id)
        elif not send.sent.cancelled() and send.sent.exception() is None:
            self.bytes_sent += num_bytes
            self.num_sent += 1

    def _refuse(
        self, request: wire.PullRequest | wire.ForeignRequest, refusal: TransferError
    ) -> None:
        try:
            endpoint = self._peers.endpoint(request.sender, request.address)
        except TransferError as unreachable:
            logger.info("%s goes without its answer: %s", request.sender.name, unreachable.detail)
            return
        header = wire.encode_header(0, refusal)
        self._worker.send(endpoint, header, wire.HEADER_TAG | request.number, _ignore)


def _key(message: wire.PullRequest | wire.AbandonNotice) -> tuple[str, int, int]:
    return (message.sender.name, message.sender.incarnation, message.number)


def _end(sent: asyncio.Future[None], error: Exception | None) -> None:
    if sent.done():
        return
    if error is None:
        sent.set_result(None)
    else:
        sent.set_exception(error)


def _ignore(_error: Exception | None) -> None:
    """A header that does not arrive is the receiver's deadline to mind."""
