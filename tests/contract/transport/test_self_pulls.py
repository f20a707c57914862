"""A process that pulls what it exposes itself: nothing is sent, and leases mean what they mean."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from shared.errors import Outcome, TransferError
from shared.messages.descriptor import WorkerRef
from shared.transport.base import Segment
from tests.contract.transport.conftest import World
from tests.support.exposed import Exposed, pattern, until


@pytest.mark.parametrize("is_instant", [False, True])
async def test_bytes_are_copied_and_none_are_sent(world: World, is_instant: bool) -> None:
    owner = await world.open("owner")
    exposed = Exposed(owner, "lease", [1 << 20, 24], is_instant=is_instant)
    for index, value in enumerate(exposed.values):
        landing = np.zeros(value.nbytes, np.uint8)
        await owner.pull(exposed.ref, index, landing, timeout_s=5)
        np.testing.assert_array_equal(landing, value)
    counters = owner.counters()
    assert counters.bytes_local == (1 << 20) + 24
    assert (counters.bytes_sent, counters.bytes_received) == (0, 0)
    assert (counters.transfers_sent, counters.transfers_received) == (0, 0)
    await owner.release(exposed.ref, "request")
    assert exposed.num_releases == 1


async def test_what_is_over_is_refused_with_its_outcome(world: World) -> None:
    owner = await world.open("owner", lease_s=0.3)
    revoked, released, expired = (Exposed(owner, name, [8]) for name in ("v", "r", "e"))
    owner.revoke("v")
    await owner.release(released.ref, "request")
    await asyncio.wait_for(expired.released.wait(), 5)
    outcomes = []
    for exposed in (revoked, released, expired):
        with pytest.raises(TransferError) as failure:
            await owner.pull(exposed.ref, 0, bytearray(8), timeout_s=5)
        outcomes.append(failure.value.outcome)
    assert outcomes == [Outcome.CANCELLED, Outcome.MISSING, Outcome.EXPIRED]
    assert owner.counters().transfers_failed == 3


async def test_a_reference_to_an_earlier_life_is_refused(world: World) -> None:
    owner = await world.open("owner", incarnation=7)
    exposed = Exposed(owner, "lease", [8])
    old = exposed.ref.model_copy(update={"owner": WorkerRef(name="owner", incarnation=6)})
    with pytest.raises(TransferError) as failure:
        await owner.pull(old, 0, bytearray(8), timeout_s=5)
    assert failure.value.outcome is Outcome.VERSION


async def test_memory_is_held_while_it_is_copied(world: World) -> None:
    owner = await world.open("owner")
    gate, opened = threading.Event(), threading.Event()

    def wait() -> None:
        opened.set()
        gate.wait(5)

    exposed = Exposed(owner, "lease", [1000], before_open=wait)
    landing = bytearray(1000)
    pull = asyncio.create_task(owner.pull(exposed.ref, 0, landing, timeout_s=5))
    await until(opened.is_set)
    owner.revoke("lease")
    assert exposed.num_releases == 0
    gate.set()
    await pull  # a copy that began is finished
    assert bytes(landing) == exposed.values[0].tobytes()
    assert exposed.num_releases == 1


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_a_pull_that_is_over_writes_nothing(world: World, is_cancelled: bool) -> None:
    owner = await world.open("owner")
    gate = threading.Event()
    exposed = Exposed(owner, "lease", [1000], before_open=lambda: gate.wait(5) and None)
    landing = bytearray(1000)
    pull = asyncio.create_task(owner.pull(exposed.ref, 0, landing, timeout_s=0.1))
    if is_cancelled:
        await asyncio.sleep(0.02)
        pull.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pull
    else:
        with pytest.raises(TransferError, match=r"0.1 s") as failure:
            await pull
        assert failure.value.outcome is Outcome.INTERNAL
    owner.revoke("lease")
    assert exposed.num_releases == 0  # the segment is still being opened
    gate.set()
    await asyncio.wait_for(exposed.released.wait(), 5)
    assert landing == bytearray(1000)
    assert owner.counters().bytes_local == 0


async def test_segments_that_fail_say_how(world: World) -> None:
    owner = await world.open("owner")

    def not_ready() -> bytes:
        raise TransferError(Outcome.NOT_READY, "said the segment")

    opens = (not_ready, lambda: pattern(23), lambda: 1 / 0)
    outcomes = []
    for is_instant in (False, True):
        ref = owner.expose(
            f"lease-{is_instant}",
            [Segment(24, opened, is_instant) for opened in opens],
            holders=["request"],
            on_release=lambda: None,
        )
        for index in range(len(opens)):
            with pytest.raises(TransferError) as failure:
                await owner.pull(ref, index, bytearray(24), timeout_s=5)
            outcomes.append(failure.value.outcome)
    assert outcomes == [Outcome.NOT_READY, Outcome.INTERNAL, Outcome.INTERNAL] * 2


async def test_closing_waits_for_what_is_being_copied(world: World) -> None:
    owner = await world.open("owner")
    gate, opened = threading.Event(), threading.Event()

    def wait() -> None:
        opened.set()
        gate.wait(5)

    exposed = Exposed(owner, "lease", [1000], before_open=wait)
    pull = asyncio.create_task(owner.pull(exposed.ref, 0, bytearray(1000), timeout_s=0.05))
    await until(opened.is_set)
    with pytest.raises(TransferError):
        await pull
    closing = asyncio.create_task(owner.__aexit__(None, None, None))
    await asyncio.sleep(0.05)
    assert exposed.num_releases == 0
    gate.set()
    await closing
    assert exposed.num_releases == 1
    await owner.__aenter__()  # for the fixture to close
