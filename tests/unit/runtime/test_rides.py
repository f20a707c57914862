"""Decode steps that ride in passes of prompts: who waits for whom."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from shared.runtime import rides as module
from shared.runtime.rides import Rides


class Step:
    def board(self) -> list[Any]:
        return []

    def arrive(self, logits: Any) -> None: ...


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_step_is_taken_alone_while_there_are_no_passes() -> None:
    rides = Rides()
    assert not await rides.ride(Step())
    rides.none_follow()
    assert not await rides.ride(Step())


async def test_a_pass_takes_nobody_along_where_nobody_steps() -> None:
    async with asyncio.timeout(module.BOARDING_S / 2):
        assert await Rides().board() is None


async def test_a_pass_waits_for_the_step_under_way_and_takes_the_next() -> None:
    rides, next_step = Rides(), Step()
    assert not await rides.ride(Step())
    boarding = asyncio.create_task(rides.board())
    await settled()
    assert not boarding.done()
    riding = asyncio.create_task(rides.ride(next_step))
    ride = await boarding
    assert ride is not None
    assert ride.riders is next_step
    assert not riding.done()
    rides.end(ride, is_computed=True)
    assert await riding


async def test_the_step_after_a_ride_is_waited_for_too() -> None:
    rides, after = Rides(), Step()
    await rides.board()
    first = asyncio.create_task(rides.ride(Step()))
    await settled()
    ride = await rides.board()
    assert ride is not None
    rides.end(ride, is_computed=True)
    boarding = asyncio.create_task(rides.board())  # before decode has seen that the pass is over
    await first
    riding = asyncio.create_task(rides.ride(after))
    later = await boarding
    assert later is not None
    assert later.riders is after
    rides.end(later, is_computed=False)
    assert not await riding


async def test_a_step_that_came_too_late_rides_in_the_next_pass_or_is_taken_alone() -> None:
    rides = Rides()
    assert await rides.board() is None
    riding = asyncio.create_task(rides.ride(Step()))
    await settled()
    assert not riding.done()
    rides.none_follow()
    assert not await riding


async def test_decode_at_rest_holds_up_no_pass() -> None:
    rides = Rides()
    assert not await rides.ride(Step())
    boarding = asyncio.create_task(rides.board())
    await settled()
    rides.rest()
    async with asyncio.timeout(module.BOARDING_S / 2):
        assert await boarding is None


async def test_a_pass_waits_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BOARDING_S", 0.01)
    rides = Rides()
    assert not await rides.ride(Step())
    async with asyncio.timeout(5.0):
        assert await rides.board() is None


async def test_a_pass_within_a_pass_leaves_the_riders_where_they_are() -> None:
    rides = Rides()
    await rides.board()
    riding = asyncio.create_task(rides.ride(Step()))
    await settled()
    outer = await rides.board()
    async with asyncio.timeout(module.BOARDING_S / 2):
        assert await rides.board() is None
    assert outer is not None
    assert not riding.done()
    rides.end(outer, is_computed=True)
    assert await riding


async def test_a_cancelled_step_leaves_before_it_boards_and_stays_once_it_has() -> None:
    rides = Rides()
    await rides.board()
    waiting = asyncio.create_task(rides.ride(Step()))
    await settled()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await rides.board() is None
    on_board = asyncio.create_task(rides.ride(Step()))
    await settled()
    ride = await rides.board()
    assert ride is not None
    on_board.cancel()
    await settled()
    assert not on_board.done(), "the pass still writes into its blocks"
    rides.end(ride, is_computed=True)
    with pytest.raises(asyncio.CancelledError):
        await on_board
