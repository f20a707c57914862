"""Bytes arrive whole, in any order, in memory of many kinds; every failure has its outcome."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest

from shared.errors import Outcome, TransferError
from shared.messages.descriptor import WorkerRef
from shared.transport.base import Segment
from tests.contract.transport.conftest import World
from tests.support.exposed import Exposed, pattern, until


@pytest.mark.parametrize("is_instant", [False, True])
@pytest.mark.parametrize("num_bytes", [1, 1024, 1 << 20, (5 << 20) + 3])
async def test_bytes_arrive(world: World, num_bytes: int, is_instant: bool) -> None:
    owner, receiver = await world.open("owner"), await world.open("receiver")
    exposed = Exposed(owner, "lease", [num_bytes], is_instant=is_instant)
    landing = bytearray(num_bytes)
    await receiver.pull(exposed.ref, 0, landing, timeout_s=5)
    assert bytes(landing) == exposed.values[0].tobytes()
    assert receiver.counters().bytes_received == num_bytes
    assert receiver.counters().transfers_received == 1
    await until(lambda: owner.counters().bytes_sent == num_bytes)


async def test_segments_arrive_out_of_order_and_at_once(world: World) -> None:
    owner, receiver = await world.open("owner"), await world.open("receiver")
    sizes = [100, 70_000, 3, 1 << 20, 4096]
    exposed = Exposed(owner, "lease", sizes)
    landings = [np.zeros(size, np.uint8) for size in sizes]
    async with asyncio.TaskGroup() as group:
        for index in (3, 0, 4, 2, 1):
            group.create_task(receiver.pull(exposed.ref, index, landings[index], timeout_s=5))
    for landing, value in zip(landings, exposed.values, strict=True):
        np.testing.assert_array_equal(landing, value)


async def test_the_same_segment_can_be_pulled_again(world: World) -> None:
    owner, receiver = await world.open("owner"), await world.open("receiver")
    exposed = Exposed(owner, "lease", [1000])
    for _ in range(3):
        landing = np.zeros(1000, np.uint8)
        await receiver.pull(exposed.ref, 0, landing, timeout_s=5)
        np.testing.assert_array_equal(landing, exposed.values[0])


async def test_a_transport_pulls_from_itself(world: World) -> None:
    owner = await world.open("owner")
    exposed = Exposed(owner, "lease", [1 << 20])
    landing = np.zeros(1 << 20, np.uint8)
    await owner.pull(exposed.ref, 0, landing, timeout_s=5)
    np.testing.assert_array_equal(landing, exposed.values[0])


@pytest.mark.parametrize(
    "landing",
    [
        bytearray(24),
        memoryview(bytearray(24)),
        np.zeros((2, 3), np.float32),
        np.zeros(100, np.uint8)[10:34],
    ],
)
async def test_kinds_of_memory(world: World, landing: Any) -> None:
    owner, receiver = await world.open("owner"), await world.open("receiver")
    exposed = Exposed(owner, "lease", [24])
    await receiver.pull(exposed.ref, 0, landing, timeout_s=5)
    assert bytes(landing) == exposed.values[0].tobytes()


@pytest.mark.parametrize(
    "landing", [bytearray(23), bytearray(25), bytes(24), np.zeros(48, np.uint8)[::2], [0] * 24]
)
async def test_unfit_memory_is_refused_at_once(world: World, landing: Any) -> None:
    owner, receiver = await world.open("owner"), await world.open("receiver")
    exposed = Exposed(owner, "lease", [24])
    with pytest.raises((ValueError, TypeError)):
        await receiver.pull(exposed.ref, 0, landing, timeout_s=5)


async def test_a_segment_that_does_not_exist_is_refused(world: World) -> None:
    owner, receiver = await world.open("owner"), await world.open("receiver")
    exposed = Exposed(owner, "lease", [24])
    with pytest.raises(ValueError, match="segment 1"):
        await receiver.pull(exposed.ref, 1, bytearray(24), timeout_s=5)
    forged = exposed.ref.model_copy(update={"segment_bytes": (24, 8)})
    with pytest.raises(TransferError) as failure:
        await receiver.pull(forged, 1, bytearray(8), timeout_s=5)
    assert failure.value.outcome is Outcome.INTERNAL


async def test_sizes_must_agree(world: World) -> None:
    owner, receiver = await world.open("owner"), await world.open("receiver")
    exposed = Exposed(owner, "lease", [24])
    forged = exposed.ref.model_copy(update={"segment_bytes": (48,)})
    landing = bytearray(48)
    with pytest.raises(TransferError) as failure:
        await receiver.pull(forged, 0, landing, timeout_s=5)
    assert failure.value.outcome is Outcome.INTERNAL
    assert landing == bytearray(48)
    assert receiver.counters().transfers_failed == 1


async def test_unknown_lease_is_missing(world: World) -> None:
    owner, receiver = await world.open("owner"), await world.open("receiver")
    exposed = Exposed(owner, "lease", [24])
    other = exposed.ref.model_copy(update={"lease_id": "other"})
    with pytest.raises(TransferError, match="other is unknown") as failure:
        await receiver.pull(other, 0, bytearray(24), timeout_s=5)
    assert failure.value.outcome is Outcome.MISSING


async def test_incompatible_peers_refuse_each_other(world: World) -> None:
    owner = await world.open("owner", compatibility="model-b:bfloat16")
    receiver = await world.open("receiver")
    exposed = Exposed(owner, "lease", [24])
    with pytest.raises(TransferError) as failure:
        await receiver.pull(exposed.ref, 0, bytearray(24), timeout_s=5)
    assert failure.value.outcome is Outcome.INCOMPATIBLE
    forged = exposed.ref.model_copy(update={"compatibility": "model-a:float32"})
    with pytest.raises(TransferError) as failure:
        await receiver.pull(forged, 0, bytearray(24), timeout_s=5)
    assert failure.value.outcome is Outcome.INCOMPATIBLE


async def test_another_life_of_the_owner_refuses_old_references(world: World) -> None:
    owner, receiver = await world.open("owner", incarnation=7), await world.open("receiver")
    exposed = Exposed(owner, "lease", [24])
    old = exposed.ref.model_copy(update={"owner": WorkerRef(name="owner", incarnation=6)})
    with pytest.raises(TransferError) as failure:
        await receiver.pull(old, 0, bytearray(24), timeout_s=5)
    assert failure.value.outcome is Outcome.VERSION


async def test_a_receiver_rejects_what_is_older_than_it_knows(world: World) -> None:
    first, receiver = await world.open("owner", incarnation=1), await world.open("receiver")
    old = Exposed(first, "lease", [24])
    await receiver.pull(old.ref, 0, bytearray(24), timeout_s=5)
    second = await world.open("owner", incarnation=2)
    new = Exposed(second, "lease", [24])
    await receiver.pull(new.ref, 0, bytearray(24), timeout_s=5)
    with pytest.raises(TransferError) as failure:
        await receiver.pull(old.ref, 0, bytearray(24), timeout_s=5)
    assert failure.value.outcome is Outcome.VERSION


async def test_open_may_answer_with_an_outcome(world: World) -> None:
    owner, receiver = await world.open("owner"), await world.open("receiver")
    for outcome in (Outcome.NOT_READY, Outcome.MISSING):

        def fail(outcome: Outcome = outcome) -> None:
            raise TransferError(outcome, "said the segment")

        exposed = Exposed(owner, f"lease-{outcome}", [24], before_open=fail)
        with pytest.raises(TransferError, match="said the segment") as failure:
            await receiver.pull(exposed.ref, 0, bytearray(24), timeout_s=5)
        assert failure.value.outcome is outcome
        owner.revoke(f"lease-{outcome}")
        assert exposed.num_releases == 1


async def test_a_broken_segment_is_internal(world: World) -> None:
    owner, receiver = await world.open("owner"), await world.open("receiver")
    ref = owner.expose(
        "lease",
        [Segment(24, lambda: pattern(23)), Segment(24, lambda: 1 / 0)],
        holders=["request"],
        on_release=lambda: None,
    )
    for index in (0, 1):
        with pytest.raises(TransferError) as failure:
            await receiver.pull(ref, index, bytearray(24), timeout_s=5)
        assert failure.value.outcome is Outcome.INTERNAL


async def test_deadline(world: World) -> None:
    owner, receiver = await world.open("owner"), await world.open("receiver")
    gate = threading.Event()
    exposed = Exposed(owner, "lease", [1 << 20], before_open=lambda: gate.wait(5) and None)
    landing = bytearray(1 << 20)
    with pytest.raises(TransferError) as failure:
        await receiver.pull(exposed.ref, 0, landing, timeout_s=0.1)
    assert failure.value.outcome is Outcome.INTERNAL
    gate.set()
    await asyncio.sleep(0.1)
    assert landing == bytearray(1 << 20)
    assert receiver.counters().quarantined_bytes == 0
    await receiver.pull(exposed.ref, 0, landing, timeout_s=5)


async def test_cancelled_pull_touches_nothing_and_frees_the_lease(world: World) -> None:
    owner, receiver = await world.open("owner"), await world.open("receiver")
    gate = threading.Event()
    exposed = Exposed(owner, "lease", [1 << 20], before_open=lambda: gate.wait(5) and None)
    landing = bytearray(1 << 20)
    pull = asyncio.create_task(receiver.pull(exposed.ref, 0, landing, timeout_s=5))
    await asyncio.sleep(0.05)
    pull.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pull
    owner.revoke("lease")
    assert exposed.num_releases == 0  # the segment is still being opened
    gate.set()
    await asyncio.wait_for(exposed.released.wait(), 5)
    assert landing == bytearray(1 << 20)
    assert receiver.counters().quarantined_bytes == 0


async def test_many_pulls_at_once(world: World) -> None:
    owner = await world.open("owner")
    receivers = [await world.open(f"receiver-{index}") for index in range(3)]
    exposed = [Exposed(owner, f"lease-{index}", [1000 + index]) for index in range(100)]

    async def pull_one(index: int) -> None:
        landing = bytearray(1000 + index)
        receiver = receivers[index % 3]
        await receiver.pull(exposed[index].ref, 0, landing, timeout_s=10)
        assert bytes(landing) == exposed[index].values[0].tobytes()
        await receiver.release(exposed[index].ref, "request")

    async with asyncio.TaskGroup() as group:
        for index in range(100):
            group.create_task(pull_one(index))
    await until(lambda: owner.counters().leases_open == 0)
    assert [one.num_releases for one in exposed] == [1] * 100
