"""Who is offered what between two stages of one process."""

from __future__ import annotations

import asyncio

from shared.cache.block_pool import BlockPool
from shared.messages.descriptor import RequestDescriptor, SamplingParams, WorkerRef
from shared.runtime.hand_over import Answer, HandOver, Prefilled


def prefilled(*block_ids: int) -> Prefilled:
    request = RequestDescriptor(
        request_id="r",
        attempt=0,
        gateway=WorkerRef(name="g", incarnation=1),
        model="m",
        prompt_token_ids=(1, 2),
        sampling=SamplingParams(max_tokens=4),
        created_unix_s=0.0,
        deadline_unix_s=1.0,
    )
    return Prefilled(request, block_ids, last_token_id=3, next_pos=2)


async def nothing() -> None:
    """An answer that is complete at once."""


def full(_prefilled: Prefilled) -> Answer | None:
    return None


async def test_an_open_decode_stage_is_offered_the_sequence() -> None:
    hand_over = HandOver(BlockPool(8, 16))
    taken: list[Prefilled] = []

    def accept(each: Prefilled) -> Answer:
        taken.append(each)
        return nothing()

    hand_over.open(accept)
    answer = await hand_over.offer(prefilled(0, 1))
    assert answer is not None
    await answer
    assert [each.block_ids for each in taken] == [(0, 1)]


async def test_without_room_or_when_closed_it_is_queued() -> None:
    hand_over = HandOver(BlockPool(8, 16))
    assert await hand_over.offer(prefilled(*range(8))) is None  # not open yet
    hand_over.open(full)
    assert await hand_over.offer(prefilled(0, 1, 2, 3)) is None
    hand_over.close()
    assert await hand_over.offer(prefilled(*range(8))) is None


async def test_what_is_queued_never_pins_more_than_half_of_the_pool() -> None:
    hand_over = HandOver(BlockPool(8, 16))
    hand_over.open(full)
    hand_over.opened("lease", (0, 1, 2))
    waiting = asyncio.create_task(hand_over.offer(prefilled(3, 4)))
    await asyncio.sleep(0)
    hand_over.room.notify()
    await asyncio.sleep(0)
    assert not waiting.done()
    hand_over.ended("lease")
    assert await asyncio.wait_for(waiting, 1.0) is None


async def test_who_waits_is_taken_when_there_is_room_again() -> None:
    hand_over = HandOver(BlockPool(8, 16))
    hand_over.open(full)
    hand_over.opened("lease", (0, 1, 2, 3))
    waiting = asyncio.create_task(hand_over.offer(prefilled(4)))
    await asyncio.sleep(0)
    hand_over.open(lambda _: nothing())
    hand_over.room.notify()
    answer = await asyncio.wait_for(waiting, 1.0)
    assert answer is not None
    await answer


async def test_closing_sends_who_waits_to_the_queue() -> None:
    hand_over = HandOver(BlockPool(8, 16))
    hand_over.open(full)
    hand_over.opened("lease", (0, 1, 2, 3))
    waiting = asyncio.create_task(hand_over.offer(prefilled(4)))
    await asyncio.sleep(0)
    hand_over.close()
    assert await asyncio.wait_for(waiting, 1.0) is None


def test_only_open_leases_are_known() -> None:
    hand_over = HandOver(BlockPool(8, 16))
    hand_over.opened("lease", (4, 5))
    assert hand_over.leased("lease") == (4, 5)
    assert hand_over.leased("other") == ()
    for _ in range(2):
        hand_over.ended("lease")
    assert hand_over.leased("lease") == ()
