"""Bytes between two processes over UCX: sizes, order, concurrency, idleness, both directions."""

from __future__ import annotations

import asyncio
import random

import numpy as np
import pytest

from shared.transport.base import Segment
from shared.transport.ucx import UcxTransport
from tests.support.exposed import until
from tests.support.transport_peer import filled, transport_peer


@pytest.mark.parametrize("num_bytes", [1 << 10, 1 << 20, 64 << 20])
async def test_sizes(transport: UcxTransport, num_bytes: int) -> None:
    async with transport_peer() as peer:
        ref = await peer.expose("lease", [num_bytes])
        landing = np.zeros(num_bytes, np.uint8)
        await transport.pull(ref, 0, landing, timeout_s=5)
        np.testing.assert_array_equal(landing, filled(num_bytes, 0))
        assert transport.counters().bytes_received == num_bytes
        assert (await peer.ask("counters"))["bytes_sent"] == num_bytes
        await transport.release(ref, "request")
        await asyncio.sleep(0.05)
        assert await peer.ask("released") == ["lease"]


async def test_many_pulls_at_once_out_of_order(transport: UcxTransport) -> None:
    sizes = [random.Random(7).choice([10, 5_000, 100_000, 2_000_000]) for _ in range(60)]
    async with transport_peer() as peer:
        ref = await peer.expose("lease", sizes)
        landings = [np.zeros(size, np.uint8) for size in sizes]
        order = random.Random(8).sample(range(60), 60)
        async with asyncio.TaskGroup() as group:
            for index in order:
                group.create_task(transport.pull(ref, index, landings[index], timeout_s=8))
        for index, landing in enumerate(landings):
            np.testing.assert_array_equal(landing, filled(sizes[index], index))


async def test_both_directions(transport: UcxTransport) -> None:
    async with transport_peer() as peer:
        theirs = await peer.expose("lease", [1 << 20])
        value = filled(1 << 20, 0)
        segment = Segment(value.nbytes, lambda: value)
        ours = transport.expose("ours", [segment], holders=["a"], on_release=lambda: None)
        landing = np.zeros(1 << 20, np.uint8)
        answer, _ = await asyncio.gather(
            peer.pull(ours), transport.pull(theirs, 0, landing, timeout_s=5)
        )
        assert answer == "ok"
        np.testing.assert_array_equal(landing, value)


async def test_concurrent_first_contact_makes_one_endpoint(transport: UcxTransport) -> None:
    async with transport_peer() as peer:
        ref = await peer.expose("lease", [100] * 20)
        pulls = [transport.pull(ref, i, bytearray(100), timeout_s=5) for i in range(20)]
        await asyncio.gather(*pulls)
        assert transport.num_connected == 1


async def test_idle_longer_than_a_lease_then_a_pull(transport: UcxTransport) -> None:
    async with transport_peer(lease_s=0.5) as peer:
        first = await peer.expose("first", [1000])
        await transport.pull(first, 0, bytearray(1000), timeout_s=5)
        await asyncio.sleep(2.5)
        assert await peer.ask("released") == ["first"]
        assert await peer.pull(first) == "expired"
        second = await peer.expose("second", [1 << 20])
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        await transport.pull(second, 0, bytearray(1 << 20), timeout_s=5)
        assert loop.time() - started_s < 0.25


async def test_no_wake_up_is_lost(transport: UcxTransport) -> None:
    """Small pulls one after the other: none may wait for the periodic look (0.25 s)."""
    async with transport_peer() as peer:
        ref = await peer.expose("lease", [10_240])
        loop = asyncio.get_running_loop()
        landing = bytearray(10_240)
        slow = 0
        for _ in range(2000):
            started_s = loop.time()
            await transport.pull(ref, 0, landing, timeout_s=5)
            slow += loop.time() - started_s > 0.2
        assert slow == 0


async def test_bursts_after_idle_moments(transport: UcxTransport) -> None:
    async with transport_peer() as peer:
        ref = await peer.expose("lease", [100, 300_000])
        loop = asyncio.get_running_loop()
        for pause_s in (0.0, 0.01, 0.1, 0.3, 0.01, 0.0):
            await asyncio.sleep(pause_s)
            started_s = loop.time()
            await asyncio.gather(
                *(transport.pull(ref, i % 2, bytearray([100, 300_000][i % 2]), timeout_s=5)
                  for i in range(8))
            )  # fmt: skip
            assert loop.time() - started_s < 0.2


async def test_abandoned_pulls_leave_nothing_behind(transport: UcxTransport) -> None:
    async with transport_peer() as peer:
        ref = await peer.expose("lease", [1 << 20, 100], open_s=0.02)
        landings = [bytearray(ref.segment_bytes[i % 2]) for i in range(40)]
        pulls = [
            asyncio.create_task(transport.pull(ref, i % 2, landing, timeout_s=5))
            for i, landing in enumerate(landings)
        ]
        for index, pull in enumerate(pulls):
            await asyncio.sleep(0.003)
            if index % 4:
                pull.cancel()
        results = await asyncio.gather(*pulls, return_exceptions=True)
        assert sum(result is None for result in results) >= 10
        await until(lambda: transport.counters().quarantined_bytes == 0)
        await peer.ask("revoke", lease_id="lease")
        for _ in range(100):
            if await peer.ask("released"):
                break
            await asyncio.sleep(0.02)
        assert await peer.ask("released") == ["lease"]
