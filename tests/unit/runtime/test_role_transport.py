"""What a change of role waits for before it takes the stages' memory back."""

from __future__ import annotations

import asyncio
import time

from shared.messages.descriptor import WorkerRef
from shared.runtime.role_transport import RoleTransport
from shared.transport.base import Segment
from shared.transport.lease import STANDING
from shared.transport.loopback import LoopbackNetwork, LoopbackTransport

ME = WorkerRef(name="e0", incarnation=1)
LONG_S = 20.0


def expose(transport: RoleTransport, lease_id: str, holder: str, freed: list[str]) -> None:
    transport.expose(
        lease_id,
        [Segment(4, lambda: b"abcd")],
        holders=[holder],
        on_release=lambda: freed.append(lease_id),
    )


async def test_it_waits_for_what_was_asked_for_and_not_for_standing_offers() -> None:
    freed: list[str] = []
    async with LoopbackTransport(LoopbackNetwork(), ME, "c") as inner:
        transport = RoleTransport(inner)
        expose(transport, "offer", STANDING, freed)
        await asyncio.wait_for(transport.collected(LONG_S), 5.0)
        expose(transport, "asked", "r1", freed)
        waiting = asyncio.create_task(transport.collected(LONG_S))
        await asyncio.sleep(0)
        assert not waiting.done()
        transport.drop("r1")
        await asyncio.wait_for(waiting, 5.0)
        assert freed == ["asked"]
        transport.revoke_all()
        assert freed == ["asked", "offer"]


async def test_the_wait_is_bounded() -> None:
    async with LoopbackTransport(LoopbackNetwork(), ME, "c") as inner:
        transport = RoleTransport(inner)
        expose(transport, "asked", "r1", [])
        start_s = time.monotonic()
        await transport.collected(0.05)
        assert time.monotonic() - start_s > 0.04
