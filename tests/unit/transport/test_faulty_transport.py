"""The test double itself: it fails as told and passes on what it should."""

from __future__ import annotations

import pytest

from shared.errors import Outcome, TransferError
from shared.messages.descriptor import WorkerRef
from shared.transport.loopback import LoopbackNetwork, LoopbackTransport
from tests.support.exposed import Exposed
from tests.support.faulty_transport import HANG, FaultyTransport


async def test_faults_come_in_order() -> None:
    network = LoopbackNetwork()
    me = WorkerRef(name="worker", incarnation=1)
    async with LoopbackTransport(network, me, "model") as inner:
        faulty = FaultyTransport(inner, [Outcome.MISSING, None, HANG])
        exposed = Exposed(faulty, "lease", [10])
        with pytest.raises(TransferError, match="missing"):
            await faulty.pull(exposed.ref, 0, bytearray(10), timeout_s=5)
        await faulty.pull(exposed.ref, 0, bytearray(10), timeout_s=5)
        with pytest.raises(TransferError, match="within"):
            await faulty.pull(exposed.ref, 0, bytearray(10), timeout_s=0.01)
        faulty.loses_releases = True
        await faulty.release(exposed.ref, "request")
        assert exposed.num_releases == 0
        faulty.loses_releases = False
        await faulty.release(exposed.ref, "request")
        assert exposed.num_releases == 1
