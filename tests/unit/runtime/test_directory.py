"""Heartbeats and the directory together, over the in-memory bus."""

from __future__ import annotations

import asyncio

import pytest

from shared.bus import subjects
from shared.bus.memory_bus import MemoryBus
from shared.bus.memory_hub import MemoryHub
from shared.messages.control import Role
from shared.runtime.directory import WorkerDirectory
from shared.runtime.registration import RegistrationHeartbeat, registration_key
from shared.runtime.roster import LossReason, LostWorker
from tests.unit.runtime.test_roster import registration

TTL_S = 0.3


@pytest.fixture
def hub() -> MemoryHub:
    return MemoryHub()


async def test_a_worker_appears_becomes_ready_and_leaves(hub: MemoryHub) -> None:
    lost: asyncio.Queue[LostWorker] = asyncio.Queue()
    worker = registration(ready=False)
    async with WorkerDirectory(MemoryBus(hub), ttl_s=TTL_S, on_lost=lost.put) as directory:
        async with RegistrationHeartbeat(MemoryBus(hub), worker, ttl_s=TTL_S) as heartbeat:
            assert not directory.is_served(Role.DECODE)
            await heartbeat.update(ready=True, capacity={"blocks": 3})
            await asyncio.wait_for(directory.wait_until_served([Role.DECODE]), 2.0)
            assert directory.live(Role.DECODE)[0].capacity == {"blocks": 3}
            await asyncio.sleep(TTL_S * 2)
            assert directory.is_served(Role.DECODE), "heartbeats must keep it"
            assert not directory.is_gone(worker.worker)
        gone = await asyncio.wait_for(lost.get(), 2.0)
        assert (gone.registration.worker, gone.reason) == (worker.worker, LossReason.WITHDRAWN)
        assert directory.is_gone(worker.worker)
        assert not directory.is_served(Role.DECODE)


async def test_a_silent_worker_is_lost(hub: MemoryHub) -> None:
    lost: asyncio.Queue[LostWorker] = asyncio.Queue()
    worker = registration()
    heartbeat = RegistrationHeartbeat(MemoryBus(hub), worker, ttl_s=60.0)
    async with WorkerDirectory(MemoryBus(hub), ttl_s=TTL_S, on_lost=lost.put), heartbeat:
        gone = await asyncio.wait_for(lost.get(), 2.0)
        assert gone.registration == worker


async def test_a_leaving_worker_does_not_delete_its_successor(hub: MemoryHub) -> None:
    bus = MemoryBus(hub)
    old, new = registration(incarnation=1), registration(incarnation=2)
    async with RegistrationHeartbeat(bus, old, ttl_s=60.0):
        successor = RegistrationHeartbeat(bus, new, ttl_s=60.0)
        await successor.__aenter__()
    bucket = await bus.key_value(subjects.WORKERS_BUCKET, ttl_s=60.0)
    assert await bucket.get(registration_key(new)) is not None
    await successor.__aexit__(None, None, None)
    assert await bucket.get(registration_key(new)) is None


async def test_a_failing_callback_does_not_end_the_directory(hub: MemoryHub) -> None:
    async def on_lost(_worker: LostWorker) -> None:
        raise ValueError("a bug")

    async with WorkerDirectory(MemoryBus(hub), ttl_s=TTL_S, on_lost=on_lost) as directory:
        async with RegistrationHeartbeat(MemoryBus(hub), registration(), ttl_s=60.0):
            await asyncio.wait_for(directory.wait_until_served([Role.DECODE]), 2.0)
        async with RegistrationHeartbeat(MemoryBus(hub), registration("other"), ttl_s=60.0):
            await asyncio.wait_for(directory.wait_until_served([Role.DECODE]), 2.0)
            assert [r.worker.name for r in directory.live()] == ["other"]


async def test_a_directory_may_be_limited_to_one_model(hub: MemoryHub) -> None:
    bus = MemoryBus(hub)
    async with (
        WorkerDirectory(bus, ttl_s=TTL_S, model="m") as directory,
        RegistrationHeartbeat(bus, registration("x", model="other"), ttl_s=60.0),
    ):
        await asyncio.sleep(0.05)
        assert not directory.is_served(Role.DECODE)
