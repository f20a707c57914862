"""Turns on shared cores: when decoders wait for a pass, and for how long at most."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from shared.bus.memory_bus import MemoryBus
from shared.messages.descriptor import WorkerRef
from shared.runtime.core_turns import LONG_S, MARGIN, MAX_PAUSE_S, LongPasses, Turns


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
async def bus() -> AsyncIterator[MemoryBus]:
    async with MemoryBus() as bus:
        yield bus


def passes(bus: MemoryBus, name: str = "prefill-0", group: str = "here") -> LongPasses:
    return LongPasses(bus, WorkerRef(name=name, incarnation=1), group)


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_step_waits_for_the_end_of_a_long_pass(bus: MemoryBus) -> None:
    prefill, clock = passes(bus), Clock()
    turns = Turns(bus, "here", clock)
    async with turns.listening():
        await turns.free()
        await prefill.begins(512)
        await settled()
        assert turns.pause_s(clock.now_s) <= 0, "the first pass tells how long others take"
        await prefill.ended(512, 1.0)
        await prefill.begins(256)
        await settled()
        assert turns.pause_s(clock.now_s) == pytest.approx(0.5 * MARGIN)
        waiting = asyncio.create_task(turns.free())
        await settled()
        assert not waiting.done()
        await prefill.ended(256, 0.5)
        await asyncio.wait_for(waiting, 5.0)


async def test_short_passes_keep_nobody(bus: MemoryBus) -> None:
    prefill, clock = passes(bus), Clock()
    turns = Turns(bus, "here", clock)
    async with turns.listening():
        await prefill.ended(512, 0.9 * LONG_S)
        await prefill.begins(512)
        await settled()
        assert turns.pause_s(clock.now_s) <= 0


async def test_a_pause_has_an_end_whatever_is_heard(bus: MemoryBus) -> None:
    prefill, clock = passes(bus), Clock()
    turns = Turns(bus, "here", clock)
    async with turns.listening():
        await turns.free()
        await prefill.ended(512, 1.0)
        await prefill.begins(512)
        await settled()
        clock.now_s += MARGIN
        assert turns.pause_s(clock.now_s) <= 0, "its end may have been lost"
        await turns.free()
        await prefill.begins(51_200)
        await settled()
        assert turns.pause_s(clock.now_s) == pytest.approx(MAX_PAUSE_S)


async def test_the_longest_of_several_passes_counts(bus: MemoryBus) -> None:
    one, other, clock = passes(bus), passes(bus, "prefill-1"), Clock()
    turns = Turns(bus, "here", clock)
    async with turns.listening():
        await turns.free()
        for each in (one, other):
            await each.ended(512, 1.0)
        await one.begins(512)
        await other.begins(256)
        await settled()
        assert turns.pause_s(clock.now_s) == pytest.approx(MARGIN)
        await one.ended(512, 1.0)
        await settled()
        assert turns.pause_s(clock.now_s) == pytest.approx(0.5 * MARGIN)


@pytest.mark.parametrize(("told", "heard"), [("here", "there"), ("", ""), ("here", "")])
async def test_others_cores_are_their_own(bus: MemoryBus, told: str, heard: str) -> None:
    prefill, clock = passes(bus, group=told), Clock()
    turns = Turns(bus, heard, clock)
    async with turns.listening():
        await prefill.ended(512, 1.0)
        await prefill.begins(512)
        await settled()
        assert turns.pause_s(clock.now_s) <= 0
