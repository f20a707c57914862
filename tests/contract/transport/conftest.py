"""The same tests over both transports: `world` says which one, and opens transports of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from shared.messages.descriptor import WorkerRef
from shared.transport.base import Transport
from shared.transport.loopback import LoopbackNetwork, LoopbackTransport

COMPATIBILITY = "model-a:float32"


class World:
    """Transports that can reach each other."""

    def __init__(self, kind: str, scope: AsyncExitStack) -> None:
        self._kind = kind
        self._scope = scope
        self._network = LoopbackNetwork()

    async def open(
        self,
        name: str,
        *,
        incarnation: int = 1,
        compatibility: str = COMPATIBILITY,
        lease_s: float = 30.0,
    ) -> Transport:
        """Another transport, open until the test ends."""
        me = WorkerRef(name=name, incarnation=incarnation)
        if self._kind == "loopback":
            loopback = LoopbackTransport(self._network, me, compatibility, lease_s=lease_s)
            return await self._scope.enter_async_context(loopback)
        from shared.transport.ucx import UcxTransport

        ucx = UcxTransport(me, compatibility, lease_s=lease_s)
        return await self._scope.enter_async_context(ucx)


@pytest.fixture(params=["loopback", "ucx"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    async with AsyncExitStack() as scope:
        yield World(request.param, scope)
