"""Turns on shared cores: who computes when, and what a process that dies leaves behind."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from contextlib import AsyncExitStack
from itertools import pairwise
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from shared.runtime.core_turns import CoreTurns


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    return tmp_path / "cores"


async def settled() -> None:
    await asyncio.sleep(0.02)


async def test_one_step_at_a_time(lock: Path) -> None:
    one, other = CoreTurns(lock), CoreTurns(lock)
    began = asyncio.Event()

    async def step() -> None:
        async with other.turn():
            began.set()

    async with one.turn():
        waiting = asyncio.create_task(step())
        await settled()
        assert not began.is_set()
    await asyncio.wait_for(waiting, 5.0)


async def test_a_turn_ends_with_its_call(lock: Path) -> None:
    one, other = CoreTurns(lock), CoreTurns(lock)
    async with one.turn() as turn:
        assert await asyncio.to_thread(turn.last(lambda number: number + 1), 1) == 2
        async with asyncio.timeout(1.0), other.turn():
            pass
    async with one.turn() as turn:
        with pytest.raises(ZeroDivisionError):
            turn.last(lambda: 1 // 0)()
        async with asyncio.timeout(1.0), other.turn():
            pass


async def test_whoever_asks_again_stands_at_the_end_of_the_line(lock: Path) -> None:
    taken: list[str] = []

    async def steps(name: str, number: int) -> None:
        turns = CoreTurns(lock)
        for _ in range(number):
            async with turns.turn():
                taken.append(name)
                await asyncio.sleep(0.005)

    await asyncio.gather(steps("prefill", 20), steps("decode", 20))
    changes = sum(a != b for a, b in pairwise(taken))
    assert changes > 30, taken


async def test_as_many_at_a_time_as_there_are_slots(lock: Path) -> None:
    one, two, three = (CoreTurns(lock, num_slots=2) for _ in range(3))
    async with one.turn(), two.turn():
        waiting = asyncio.create_task(three.turn().__aenter__())
        await settled()
        assert not waiting.done()
    (await asyncio.wait_for(waiting, 5.0)).end()


async def test_nobody_waits_for_ever(lock: Path) -> None:
    one, other = CoreTurns(lock), CoreTurns(lock, max_wait_s=0.05)
    async with one.turn():
        waiting = asyncio.create_task(other.turn().__aenter__())
        await settled()
        assert not waiting.done()
        (await asyncio.wait_for(waiting, 5.0)).end()


async def test_who_gives_up_leaves_its_place_to_the_next_of_its_process(lock: Path) -> None:
    one, other, third = CoreTurns(lock), CoreTurns(lock, max_wait_s=0.05), CoreTurns(lock)
    taken: list[str] = []

    async def step(name: str, turns: CoreTurns) -> None:
        async with turns.turn():
            taken.append(name)

    async with one.turn():
        async with other.turn():  # beside the others, after its time
            behind = asyncio.create_task(step("third", third))
            await settled()
        again = asyncio.create_task(step("again", other))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    await asyncio.wait_for(asyncio.gather(behind, again), 5.0)
    assert taken == ["again", "third"]


async def test_a_turn_that_comes_at_the_moment_of_giving_up_ends(lock: Path) -> None:
    one, other, third = (CoreTurns(lock) for _ in range(3))
    async with one.turn():
        waiting = asyncio.create_task(other.turn().__aenter__())
        await settled()
    time.sleep(0.1)  # the loop stands still, so the turn has come and nobody has seen it
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    async with asyncio.timeout(1.0), third.turn():
        pass


async def test_who_gives_up_waiting_leaves_the_line(lock: Path) -> None:
    one, other, third = (CoreTurns(lock) for _ in range(3))
    async with one.turn():
        waiting = asyncio.create_task(other.turn().__aenter__())
        await settled()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    async with asyncio.timeout(1.0), third.turn():
        pass


def hold(lock: Path, num_slots: int, holds: Event) -> None:
    async def turn() -> None:
        async with CoreTurns(lock, num_slots).turn():
            holds.set()
            await asyncio.sleep(60)

    asyncio.run(turn())


@pytest.mark.parametrize("num_slots", [1, 2])
async def test_the_turn_of_a_process_that_dies_ends(lock: Path, num_slots: int) -> None:
    context = multiprocessing.get_context("spawn")
    holds = context.Event()
    process = context.Process(target=hold, args=(lock, num_slots, holds))
    process.start()
    try:
        assert await asyncio.to_thread(holds.wait, 30)
        async with AsyncExitStack() as scope:
            for _ in range(num_slots - 1):
                await scope.enter_async_context(CoreTurns(lock, num_slots).turn())
            waiting = asyncio.create_task(CoreTurns(lock, num_slots).turn().__aenter__())
            await settled()
            assert not waiting.done()
            process.kill()
            (await asyncio.wait_for(waiting, 1.5)).end()  # before anybody gives up
    finally:
        process.kill()
        process.join()


async def test_without_a_file_every_turn_is_free(tmp_path: Path) -> None:
    alone = CoreTurns()
    async with alone.turn(), alone.turn():
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("num_slots", [1, 2])
async def test_a_file_that_cannot_be_made_is_no_reason_to_stop(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, num_slots: int
) -> None:
    turns = CoreTurns(tmp_path / "none" / "cores", num_slots)
    async with turns.turn(), turns.turn():
        pass
    assert len([each for each in caplog.records if "no more turns" in each.message]) == 1
