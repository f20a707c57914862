"""Pauses on the loop that services run on."""

from __future__ import annotations

import asyncio
import time

from shared.runtime.pause import Pause
from shared.runtime.signal import Signal


async def test_whoever_waits_is_told_of_the_end_whenever_it_began() -> None:
    async def keep_busy() -> None:
        while True:
            await asyncio.sleep(0)

    ended = Signal()
    pause = Pause(ended)
    other_work = asyncio.create_task(keep_busy())
    for tenths_ms in range(20):
        time.sleep(1e-4 * tenths_ms)  # another part of a millisecond each time
        pause.begin(0.002)
        assert pause.is_on
        async with asyncio.timeout(1.0):
            await ended.until(lambda: not pause.is_on)
    other_work.cancel()


async def test_a_new_pause_takes_the_place_of_the_one_before() -> None:
    ended = Signal()
    pause = Pause(ended)
    pause.begin(0.01)
    pause.begin(0.1)
    await asyncio.sleep(0.05)
    assert pause.is_on
    async with asyncio.timeout(1.0):
        await ended.until(lambda: not pause.is_on)
