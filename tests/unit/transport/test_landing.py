"""Landing memory: all or nothing, in order, and no deadlock when it is short."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import RequestFailed
from shared.transport.landing import Landing
from shared.transport.landing_budget import LandingBudget


def test_first_come_first_served() -> None:
    budget = LandingBudget(10)
    assert budget.try_reserve("a", 7)
    assert not budget.try_reserve("large", 8)
    assert not budget.try_reserve("small", 1)  # would fit, but it came later
    assert budget.num_waiting == 2
    assert budget.release("a") == ("large", "small")
    assert budget.release("a") == ()
    assert budget.free_bytes == 1


def test_a_place_in_line_can_be_given_up() -> None:
    budget = LandingBudget(10)
    budget.try_reserve("a", 7)
    budget.try_reserve("large", 8)
    budget.try_reserve("small", 1)
    assert budget.release("large") == ("small",)


def test_quarantined_bytes_count_as_taken() -> None:
    budget = LandingBudget(10)
    budget.set_quarantined(4)
    assert not budget.try_reserve("a", 7)
    assert budget.set_quarantined(3) == ("a",)
    budget.set_quarantined(8)
    assert budget.free_bytes == 0


def test_what_can_never_fit_is_refused() -> None:
    budget = LandingBudget(10)
    with pytest.raises(ValueError, match="11 bytes"):
        budget.try_reserve("a", 11)
    assert budget.try_reserve("a", 10)
    with pytest.raises(ValueError, match="already"):
        budget.try_reserve("a", 0)


@given(
    max_bytes=st.integers(1, 20),
    steps=st.lists(
        st.tuples(st.sampled_from("abcdef"), st.one_of(st.none(), st.integers(0, 20))),
        max_size=60,
    ),
)
def test_never_more_than_there_is(max_bytes: int, steps: list[tuple[str, int | None]]) -> None:
    budget, held = LandingBudget(max_bytes), {}
    waiting: dict[str, int] = {}
    for request_id, num_bytes in steps:
        if num_bytes is None:
            waiting.pop(request_id, None)
            held.pop(request_id, None)
            for served in budget.release(request_id):
                held[served] = waiting.pop(served)
        elif request_id not in held and request_id not in waiting and num_bytes <= max_bytes:
            place = held if budget.try_reserve(request_id, num_bytes) else waiting
            place[request_id] = num_bytes
        assert budget.reserved_bytes == sum(held.values()) <= max_bytes
        if waiting:  # only the first in line decides whether anybody waits
            assert next(iter(waiting.values())) > budget.free_bytes


async def test_many_requests_with_many_images_do_not_deadlock() -> None:
    """Twenty requests of five images each, in memory for seven images."""
    landing = Landing(7)
    num_landed = num_held = 0

    async def request(name: str) -> None:
        nonlocal num_landed, num_held
        async with landing.reserved(name, 5):
            num_held += 5
            assert num_held <= 7
            for _ in range(5):
                await asyncio.sleep(0)
                num_landed += 1
            num_held -= 5

    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        for index in range(20):
            group.create_task(request(f"request-{index}"))
    assert num_landed == 100
    assert landing.free_bytes == 7


async def test_cancelled_waiters_leave_the_line() -> None:
    landing = Landing(10)

    async def wait(num_bytes: int) -> None:
        async with landing.reserved("same-request", num_bytes):
            await asyncio.sleep(0.01)

    async with landing.reserved("holder", 10):
        cancelled = asyncio.create_task(wait(10))
        patient = asyncio.create_task(wait(1))
        await asyncio.sleep(0)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
    await asyncio.wait_for(patient, 1)
    assert landing.free_bytes == 10


async def test_settled_quarantine_wakes_waiters() -> None:
    landing = Landing(10)
    landing.set_quarantined(10)

    async def use() -> None:
        async with landing.reserved("request", 10):
            pass

    waiter = asyncio.create_task(use())
    await asyncio.sleep(0)
    assert not waiter.done()
    landing.set_quarantined(0)
    await asyncio.wait_for(waiter, 1)


async def test_too_large_a_request_fails_clearly() -> None:
    with pytest.raises(RequestFailed, match="11 bytes"):
        async with Landing(10).reserved("request", 11):
            pass
