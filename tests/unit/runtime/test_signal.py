"""Waiting for a condition that the same event loop changes."""

from __future__ import annotations

import asyncio
import time

import pytest

from shared.runtime.compute import ComputeThread
from shared.runtime.scope import unwrapped
from shared.runtime.signal import Signal


async def test_returns_at_once_what_is_ready() -> None:
    assert await Signal().until(lambda: "ready") == "ready"


async def test_asks_again_after_every_notify_and_wakes_all_waiters() -> None:
    signal, state = Signal(), {"open": False}
    waiters = [asyncio.create_task(signal.until(lambda: state["open"])) for _ in range(3)]
    await asyncio.sleep(0)
    signal.notify()
    await asyncio.sleep(0)
    assert not any(waiter.done() for waiter in waiters)
    state["open"] = True
    signal.notify()
    assert await asyncio.gather(*waiters) == [True, True, True]


async def test_a_cancelled_waiter_leaves_nothing_behind() -> None:
    signal = Signal()
    waiter = asyncio.create_task(signal.until(lambda: False))
    await asyncio.sleep(0)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    signal.notify()


async def test_a_group_of_failures_is_raised_as_its_first() -> None:
    async def fail() -> None:
        raise KeyError("cause")

    async def together() -> None:
        with unwrapped():
            async with asyncio.TaskGroup() as group:
                group.create_task(fail())
                group.create_task(asyncio.sleep(10))

    with pytest.raises(KeyError, match="cause"):
        await together()


async def test_a_cancelled_caller_waits_for_a_call_that_has_begun() -> None:
    order: list[str] = []
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow() -> None:
        loop.call_soon_threadsafe(begun.set)
        time.sleep(0.05)
        order.append("computed")

    with ComputeThread() as compute:
        task = asyncio.create_task(compute(slow))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        order.append("caller goes on")
    assert order == ["computed", "caller goes on"]


async def test_calls_run_one_after_the_other_in_order() -> None:
    with ComputeThread() as compute:
        done: list[int] = []
        await asyncio.gather(*(compute(done.append, n) for n in range(20)))
    assert done == list(range(20))
