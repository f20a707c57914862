"""Peers that die, stop or come back: every pull ends in time, and this process goes on."""

from __future__ import annotations

import asyncio
import os
import time

import numpy as np
import pytest

from shared.errors import Outcome, TransferError
from shared.messages.descriptor import WorkerRef
from shared.transport.base import Segment
from shared.transport.ucx import UcxTransport
from tests.support.exposed import until
from tests.support.transport_peer import COMPATIBILITY, filled, transport_peer

LARGE = 256 << 20


async def _still_works(transport: UcxTransport, name: str = "another") -> None:
    async with transport_peer(name) as peer:
        ref = await peer.expose("lease", [1 << 20])
        landing = np.zeros(1 << 20, np.uint8)
        await transport.pull(ref, 0, landing, timeout_s=5)
        np.testing.assert_array_equal(landing, filled(1 << 20, 0))


async def test_owner_killed_before_first_contact(transport: UcxTransport) -> None:
    async with transport_peer() as peer:
        ref = await peer.expose("lease", [1000])
        await peer.kill()
        started_s = time.monotonic()
        with pytest.raises(TransferError) as failure:
            await transport.pull(ref, 0, bytearray(1000), timeout_s=2)
        assert failure.value.outcome is Outcome.INTERNAL
        assert time.monotonic() - started_s < 2.5
        await transport.release(ref, "request")
    await _still_works(transport)


async def test_owner_killed_between_two_pulls(transport: UcxTransport) -> None:
    async with transport_peer() as peer:
        ref = await peer.expose("lease", [1000])
        await transport.pull(ref, 0, bytearray(1000), timeout_s=2)
        await peer.kill()
        for _ in range(20):
            started_s = time.monotonic()
            with pytest.raises(TransferError) as failure:
                await transport.pull(ref, 0, bytearray(1000), timeout_s=0.2)
            assert failure.value.outcome is Outcome.INTERNAL
            assert time.monotonic() - started_s < 0.7
    await _still_works(transport)


@pytest.mark.parametrize("landed_bytes", [0, 1 << 20, 100 << 20])
async def test_owner_killed_during_the_transfer(transport: UcxTransport, landed_bytes: int) -> None:
    async with transport_peer() as peer:
        ref = await peer.expose("lease", [LARGE, 100])
        await transport.pull(ref, 1, bytearray(100), timeout_s=2)
        landing = np.zeros(LARGE, np.uint8)
        pull = asyncio.create_task(transport.pull(ref, 0, landing, timeout_s=3))
        await asyncio.sleep(0)
        while landed_bytes and not landing[landed_bytes : landed_bytes + 2].any():
            await asyncio.sleep(0)
        peer.process.kill()
        started_s = time.monotonic()
        with pytest.raises(TransferError) as failure:
            await pull
        assert failure.value.outcome is Outcome.INTERNAL
        assert time.monotonic() - started_s < 3.5
        assert not landing[-2:].any()
        await until(lambda: transport.counters().quarantined_bytes == 0)
    await _still_works(transport)


async def test_owner_killed_while_it_opens(transport: UcxTransport) -> None:
    """With error handling the dead owner is noticed long before the deadline."""
    async with transport_peer() as peer:
        ref = await peer.expose("lease", [1000], open_s=5.0)
        pull = asyncio.create_task(transport.pull(ref, 0, bytearray(1000), timeout_s=8))
        await asyncio.sleep(0.2)
        await peer.kill()
        started_s = time.monotonic()
        with pytest.raises(TransferError, match="gone"):
            await pull
        assert time.monotonic() - started_s < 4


async def test_restarted_owner_refuses_old_references(transport: UcxTransport) -> None:
    async with transport_peer("worker", incarnation=1) as first:
        old = await first.expose("lease", [1000])
        await transport.pull(old, 0, bytearray(1000), timeout_s=2)
        await first.kill()
    async with transport_peer("worker", incarnation=2) as second:
        new = await second.expose("lease", [1000])
        await transport.pull(new, 0, bytearray(1000), timeout_s=2)
        mixed = new.model_copy(update={"owner": old.owner})
        for stale in (old, mixed):
            with pytest.raises(TransferError) as failure:
                await transport.pull(stale, 0, bytearray(1000), timeout_s=2)
            assert failure.value.outcome is Outcome.VERSION
        async with transport_peer("reader") as reader:  # knows neither life
            assert await reader.pull(mixed) == "version"


async def test_receiver_killed_during_the_transfer_frees_the_lease(
    transport: UcxTransport,
) -> None:
    value = np.ones(LARGE, np.uint8)
    releases: list[str] = []
    ref = transport.expose(
        "lease",
        [Segment(LARGE, lambda: value)],
        holders=["a"],
        on_release=lambda: releases.append("lease"),
    )
    async with transport_peer() as peer:
        pull = asyncio.create_task(peer.pull(ref, timeout_s=1.0))
        await asyncio.sleep(0.05)
        await peer.kill()
        with pytest.raises(AssertionError):
            await pull
    transport.revoke("lease")
    await until(lambda: releases == ["lease"], timeout_s=5)
    await _still_works(transport)


async def test_stopped_owner_costs_the_deadline_and_nothing_else(transport: UcxTransport) -> None:
    async with transport_peer() as peer:
        ref = await peer.expose("lease", [1 << 20])
        await transport.pull(ref, 0, bytearray(1 << 20), timeout_s=2)
        peer.pause()
        with pytest.raises(TransferError) as failure:
            await transport.pull(ref, 0, bytearray(1 << 20), timeout_s=0.3)
        assert failure.value.outcome is Outcome.INTERNAL
        peer.resume()
        landing = np.zeros(1 << 20, np.uint8)
        await transport.pull(ref, 0, landing, timeout_s=2)
        np.testing.assert_array_equal(landing, filled(1 << 20, 0))
        await peer.ask("revoke", lease_id="lease")
        await asyncio.sleep(0.1)
        assert await peer.ask("released") == ["lease"]


async def test_stopped_receiver_does_not_pin_memory(transport: UcxTransport) -> None:
    """The owner frees soon after the deadline, and the late receiver refuses the bytes."""
    value = filled(64 << 20, 0)
    released = asyncio.Event()
    ref = transport.expose(
        "lease", [Segment(value.nbytes, lambda: value)], holders=["a"], on_release=released.set
    )
    async with transport_peer() as peer:
        pull = asyncio.create_task(peer.pull(ref, timeout_s=0.5))
        await until(lambda: transport.num_sending > 0)
        peer.pause()
        transport.revoke("lease")
        await asyncio.wait_for(released.wait(), 4)
        peer.resume()
        assert await pull in ("internal", "cancelled", "ok")
        await asyncio.sleep(0.5)
        assert (await peer.ask("counters"))["quarantined_bytes"] == 0


async def test_nothing_stays_behind() -> None:
    def files() -> tuple[set[str], int]:
        return set(os.listdir("/dev/shm")), len(os.listdir("/proc/self/fd"))

    async def use_and_kill(incarnation: int) -> None:
        me = WorkerRef(name="here", incarnation=incarnation)
        async with UcxTransport(me, COMPATIBILITY) as transport, transport_peer() as peer:
            ref = await peer.expose("lease", [1 << 20])
            await transport.pull(ref, 0, bytearray(1 << 20), timeout_s=2)
            await peer.kill()

    await use_and_kill(1)
    before, num_before = files()
    for incarnation in (2, 3, 4):
        await use_and_kill(incarnation)
    after, num_after = files()
    assert {name for name in after - before if not name.startswith("sem.")} == set()
    assert num_after <= num_before
    assert len(asyncio.all_tasks()) == 1
