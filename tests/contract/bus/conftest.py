"""The same tests over both buses: `world` says which one, and makes connections to it."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator

import pytest

from shared.bus.base import Bus
from shared.bus.limits import BusLimits
from shared.bus.memory_bus import MemoryBus
from shared.bus.memory_hub import MemoryHub
from shared.bus.nats_bus import NatsBus
from tests.support.nats_server import NatsServer, nats_server

__all__ = ["nats_server"]

# Quick enough to wait for, slow enough for a busy machine.
LIMITS = BusLimits(ack_wait_s=0.5, max_deliver=2, queue_max_msgs=20)


class World:
    """One bus and names on it that no other test uses."""

    def __init__(self, server: NatsServer | None) -> None:
        self._server = server
        self._token = uuid.uuid4().hex[:12]
        self._hub: MemoryHub | None = None
        self._buses: list[Bus] = []

    def name(self, stem: str) -> str:
        return f"{stem}-{self._token}"

    async def connect(self, limits: BusLimits = LIMITS) -> Bus:
        """Another connection. All connections of one test should have the same limits."""
        bus: Bus
        if self._server is not None:
            bus = await NatsBus.connect(self._server.url, name="test", limits=limits)
        else:
            self._hub = self._hub or MemoryHub(limits)
            bus = MemoryBus(self._hub)
        self._buses.append(bus)
        return bus

    async def close(self) -> None:
        for bus in self._buses:
            await bus.close()


@pytest.fixture(params=["memory", "nats"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    server = request.getfixturevalue("nats_server") if request.param == "nats" else None
    world = World(server)
    yield world
    await world.close()


@pytest.fixture
async def bus(world: World) -> Bus:
    return await world.connect()
