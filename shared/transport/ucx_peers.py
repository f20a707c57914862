"""The peers a UCX transport knows: one endpoint per life of a worker.

In: worker references with their addresses. Out: endpoints. A newer incarnation replaces an older
one, which is refused from then on. Knows nothing of what is sent.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from shared.errors import Outcome, TransferError
from shared.messages.descriptor import WorkerRef
from shared.transport.ucx_worker import Endpoint, UcxWorker

MAX_PEERS = 1024
"""Beyond this many the peer that was used longest ago is disconnected; it may come back."""


@dataclass(frozen=True)
class _Peer:
    incarnation: int
    address: bytes
    endpoint: Endpoint


class UcxPeers:
    """Endpoints by worker name."""

    def __init__(self, worker: UcxWorker) -> None:
        self._worker = worker
        self._peers: OrderedDict[str, _Peer] = OrderedDict()
        self.num_connected = 0

    def endpoint(self, peer: WorkerRef, address: bytes) -> Endpoint:
        """The endpoint to a worker, made on first use. Raises `TransferError`."""
        known = self._peers.get(peer.name)
        if known is not None and known.incarnation > peer.incarnation:
            raise TransferError(
                Outcome.VERSION,
                f"{peer.name}#{peer.incarnation} was replaced by #{known.incarnation}",
            )
        is_same = known is not None and known.incarnation == peer.incarnation
        if known is not None and is_same and known.address == address and known.endpoint.alive:
            self._peers.move_to_end(peer.name)
            return known.endpoint
        return self._connect(peer, address)

    def close(self) -> None:
        """Disconnect from everybody."""
        while self._peers:
            self._drop(next(iter(self._peers)))

    def _connect(self, peer: WorkerRef, address: bytes) -> Endpoint:
        self._drop(peer.name)
        try:
            endpoint = self._worker.connect(address)
        except OSError as error:
            raise TransferError(
                Outcome.INTERNAL, f"{peer.name}#{peer.incarnation} cannot be reached: {error}"
            ) from error
        self.num_connected += 1
        self._peers[peer.name] = _Peer(peer.incarnation, address, endpoint)
        if len(self._peers) > MAX_PEERS:
            self._drop(next(iter(self._peers)))
        return endpoint

    def _drop(self, name: str) -> None:
        peer = self._peers.pop(name, None)
        if peer is not None:
            self._worker.disconnect(peer.endpoint)
