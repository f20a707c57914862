"""Memory that is exposed before it is complete."""

from __future__ import annotations

import asyncio

import pytest

from shared.errors import Outcome, TransferError
from shared.messages.refs import TensorRef
from shared.transport.base import Segment, Transport
from tests.contract.transport.conftest import World


class Growing:
    """One segment that becomes ready when told."""

    def __init__(self, owner: Transport) -> None:
        self.ready = asyncio.Event()
        self.num_waits = 0
        self.num_releases = 0
        self.memory = bytearray(8)
        self.ref: TensorRef = owner.expose(
            "lease",
            [Segment(8, lambda: self.memory, True, ready=self._wait)],
            holders=["request"],
            on_release=self._on_release,
        )

    async def _wait(self) -> None:
        self.num_waits += 1
        await self.ready.wait()

    def _on_release(self) -> None:
        self.num_releases += 1
        self.ready.set()


@pytest.mark.parametrize("is_local", [False, True])
async def test_a_pull_waits_for_its_segment(world: World, is_local: bool) -> None:
    owner = await world.open("owner")
    receiver = owner if is_local else await world.open("receiver")
    growing = Growing(owner)
    into = bytearray(8)
    pull = asyncio.create_task(receiver.pull(growing.ref, 0, into, timeout_s=10))
    async with asyncio.timeout(5):
        while not growing.num_waits:
            await asyncio.sleep(0.01)
    assert not pull.done()
    growing.memory[:] = b"complete"
    growing.ready.set()
    await pull
    assert into == b"complete"
    await receiver.release(growing.ref, "request")
    async with asyncio.timeout(5):
        while not growing.num_releases:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("is_local", [False, True])
async def test_half_the_receivers_time_is_waited(world: World, is_local: bool) -> None:
    owner = await world.open("owner")
    receiver = owner if is_local else await world.open("receiver")
    growing = Growing(owner)
    with pytest.raises(TransferError) as failure:
        await receiver.pull(growing.ref, 0, bytearray(8), timeout_s=2)
    assert failure.value.outcome is Outcome.NOT_READY
    growing.ready.set()
    await receiver.pull(growing.ref, 0, bytearray(8), timeout_s=10)


async def test_a_lease_is_not_held_by_who_waits(world: World) -> None:
    owner, receiver = await world.open("owner"), await world.open("receiver")
    growing = Growing(owner)
    pull = asyncio.create_task(receiver.pull(growing.ref, 0, bytearray(8), timeout_s=20))
    async with asyncio.timeout(5):
        while not growing.num_waits:
            await asyncio.sleep(0.01)
    owner.revoke("lease")
    assert growing.num_releases == 1
    with pytest.raises(TransferError) as failure:
        await asyncio.wait_for(pull, 5)
    assert failure.value.outcome is Outcome.CANCELLED
