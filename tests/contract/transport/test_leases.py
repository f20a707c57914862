"""Exposed memory is freed exactly once, never while it is sent, and never too early."""

from __future__ import annotations

import asyncio
import threading

import pytest

from shared.errors import Outcome, TransferError
from shared.transport.base import Segment
from tests.contract.transport.conftest import World
from tests.support.exposed import Exposed, until


async def test_the_last_release_frees_once(world: World) -> None:
    owner, receiver = await world.open("owner"), await world.open("receiver")
    exposed = Exposed(owner, "lease", [24], holders=["a", "b"])
    assert owner.counters().leases_open == 1
    for holder in ("a", "a", "nobody"):
        await receiver.release(exposed.ref, holder)
    await receiver.pull(exposed.ref, 0, bytearray(24), timeout_s=5)
    assert exposed.num_releases == 0
    for _ in range(2):
        await receiver.release(exposed.ref, "b")
    await asyncio.wait_for(exposed.released.wait(), 5)
    with pytest.raises(TransferError) as failure:
        await receiver.pull(exposed.ref, 0, bytearray(24), timeout_s=5)
    assert failure.value.outcome is Outcome.MISSING
    owner.revoke("lease")
    assert exposed.num_releases == 1
    assert owner.counters().leases_open == 0


async def test_an_owner_releases_its_own(world: World) -> None:
    owner = await world.open("owner")
    exposed = Exposed(owner, "lease", [24])
    await owner.release(exposed.ref, "request")
    await asyncio.wait_for(exposed.released.wait(), 5)


async def test_revoke(world: World) -> None:
    owner, receiver = await world.open("owner"), await world.open("receiver")
    exposed = Exposed(owner, "lease", [24])
    for _ in range(2):
        owner.revoke("lease")
    owner.revoke("unknown")
    assert exposed.num_releases == 1
    with pytest.raises(TransferError) as failure:
        await receiver.pull(exposed.ref, 0, bytearray(24), timeout_s=5)
    assert failure.value.outcome is Outcome.CANCELLED


async def test_expiry(world: World) -> None:
    owner, receiver = await world.open("owner", lease_s=0.3), await world.open("receiver")
    exposed = Exposed(owner, "lease", [24])
    await asyncio.wait_for(exposed.released.wait(), 5)
    with pytest.raises(TransferError) as failure:
        await receiver.pull(exposed.ref, 0, bytearray(24), timeout_s=5)
    assert failure.value.outcome is Outcome.EXPIRED
    assert exposed.num_releases == 1
    assert owner.counters().leases_expired == 1


async def test_holders_that_live_extend(world: World) -> None:
    owner, receiver = await world.open("owner", lease_s=0.5), await world.open("receiver")
    kept = Exposed(owner, "kept", [24], holders=["alive"])
    lost = Exposed(owner, "lost", [24], holders=["dead"])
    for _ in range(10):
        await asyncio.sleep(0.1)
        owner.extend(["alive", "unknown"])
    assert lost.num_releases == 1
    assert kept.num_releases == 0
    await receiver.pull(kept.ref, 0, bytearray(24), timeout_s=5)


async def test_memory_is_held_while_it_is_sent(world: World) -> None:
    owner, receiver = await world.open("owner"), await world.open("receiver")
    gate, opened = threading.Event(), threading.Event()

    def wait() -> None:
        opened.set()
        gate.wait(5)

    exposed = Exposed(owner, "lease", [1 << 20], before_open=wait)
    landing = bytearray(1 << 20)
    pull = asyncio.create_task(receiver.pull(exposed.ref, 0, landing, timeout_s=5))
    await until(opened.is_set)
    owner.revoke("lease")
    with pytest.raises(ValueError, match="in use"):
        Exposed(owner, "lease", [1])
    assert exposed.num_releases == 0
    gate.set()
    await pull  # a send that began is finished
    assert bytes(landing) == exposed.values[0].tobytes()
    await asyncio.wait_for(exposed.released.wait(), 5)
    assert exposed.num_releases == 1


async def test_a_lease_id_can_be_used_again_when_it_is_free(world: World) -> None:
    owner, receiver = await world.open("owner"), await world.open("receiver")
    Exposed(owner, "lease", [24])
    with pytest.raises(ValueError, match="in use"):
        Exposed(owner, "lease", [24])
    owner.revoke("lease")
    again = Exposed(owner, "lease", [24])
    await receiver.pull(again.ref, 0, bytearray(24), timeout_s=5)


async def test_a_failing_callback_harms_nobody(world: World) -> None:
    owner, receiver = await world.open("owner"), await world.open("receiver")
    bad = owner.expose("bad", [Segment(1, lambda: b"x")], holders=["a"], on_release=lambda: 1 / 0)
    exposed = Exposed(owner, "good", [24], holders=["a"])
    await receiver.release(bad, "a")
    await receiver.release(exposed.ref, "a")
    await asyncio.wait_for(exposed.released.wait(), 5)


async def test_closing_frees_what_is_exposed(world: World) -> None:
    owner, receiver = await world.open("owner"), await world.open("receiver")
    exposed = Exposed(owner, "lease", [24])
    await receiver.pull(exposed.ref, 0, bytearray(24), timeout_s=5)
    await owner.__aexit__(None, None, None)
    assert exposed.num_releases == 1
    with pytest.raises(TransferError) as failure:
        await receiver.pull(exposed.ref, 0, bytearray(24), timeout_s=1)
    assert failure.value.outcome is Outcome.INTERNAL
    await receiver.release(exposed.ref, "request")
    await owner.__aenter__()  # for the fixture to close
