"""What every work queue promises."""

from __future__ import annotations

import asyncio
import random
import time

import pytest

from shared.bus import subjects
from shared.bus.base import Bus, Headers, WorkQueue
from shared.bus.dead_letters import DELIVERIES_HEADER, REASON_HEADER
from shared.bus.limits import BusLimits
from shared.errors import QueueFull
from shared.messages.control import CancelRequest, RequestsAlive
from shared.messages.descriptor import WorkerRef
from tests.contract.bus.conftest import LIMITS, World

Queue = WorkQueue[CancelRequest]


def task(name: str) -> CancelRequest:
    return CancelRequest(request_id=name, attempt=0)


async def put(queue: Queue, *names: str) -> None:
    for name in names:
        await queue.put(task(name), message_id=name)


async def take_names(queue: Queue, max_count: int = 1, timeout_s: float = 2.0) -> list[str]:
    return [d.message.request_id for d in await queue.take(max_count, timeout_s)]


@pytest.fixture
def subject(world: World) -> str:
    return f"work.decode.{world.name('m')}"


@pytest.fixture
async def queue(bus: Bus, subject: str) -> Queue:
    return await bus.work_queue(subject, CancelRequest)


async def test_a_task_arrives_with_its_headers_and_its_queue_time(queue: Queue) -> None:
    await queue.put(task("a"), message_id="a", headers={"traceparent": "00-1-2-01"})
    await asyncio.sleep(0.05)
    (delivery,) = await queue.take(1, 2.0)
    assert delivery.message == task("a")
    assert delivery.headers == {"traceparent": "00-1-2-01"}
    assert delivery.num_delivered == 1
    assert 0.04 < delivery.queued_s < 1.0


async def test_take_returns_what_is_there_and_no_more_than_asked(queue: Queue) -> None:
    await put(queue, "a", "b", "c")
    assert await take_names(queue, 2) == ["a", "b"]
    start_s = time.monotonic()
    assert await take_names(queue, 5) == ["c"]
    assert time.monotonic() - start_s < 0.3, "a task that is there must not wait for others"


async def test_take_waits_for_a_task(queue: Queue) -> None:
    taking = asyncio.create_task(take_names(queue, 4, 5.0))
    await asyncio.sleep(0.1)
    start_s = time.monotonic()
    await put(queue, "a")
    assert await taking == ["a"]
    assert time.monotonic() - start_s < 0.3


@pytest.mark.parametrize("timeout_s", [0.0, 0.1])
async def test_take_from_an_empty_queue_times_out(queue: Queue, timeout_s: float) -> None:
    start_s = time.monotonic()
    assert await queue.take(3, timeout_s) == []
    assert timeout_s <= time.monotonic() - start_s < timeout_s + 0.4


async def test_what_nobody_asked_for_stays_in_the_queue(
    world: World, queue: Queue, subject: str
) -> None:
    other = await (await world.connect()).work_queue(subject, CancelRequest)
    taking = asyncio.create_task(take_names(queue, 10, 2.0))
    await asyncio.sleep(0.05)
    await put(queue, "a")
    assert await taking == ["a"]
    await put(queue, "b", "c")
    assert await take_names(other, 10) == ["b", "c"]


async def test_two_workers_share_a_queue(world: World, subject: str) -> None:
    first = await (await world.connect()).work_queue(subject, CancelRequest)
    second = await (await world.connect()).work_queue(subject, CancelRequest)
    names = [f"t{i}" for i in range(10)]
    await put(first, *names)
    taken = await take_names(first, 4) + await take_names(second, 10)
    assert sorted(taken) == names


async def test_a_repeated_message_id_is_dropped_even_after_the_task_ended(queue: Queue) -> None:
    await put(queue, "a", "a")
    assert await queue.depth() == 1
    (delivery,) = await queue.take(5, 2.0)
    await delivery.ack()
    await put(queue, "a")
    assert await queue.take(1, 0.1) == []


async def test_an_acknowledged_task_is_gone(queue: Queue) -> None:
    await put(queue, "a")
    (delivery,) = await queue.take(1, 2.0)
    assert await queue.depth() == 1
    await delivery.ack()
    await delivery.ack()
    await delivery.nak()
    await delivery.reject("too late")
    await asyncio.sleep(LIMITS.ack_wait_s + 0.2)
    assert await queue.take(1, 0.1) == []
    assert await queue.depth() == 0


async def test_a_task_given_back_comes_again(queue: Queue) -> None:
    await put(queue, "a")
    (delivery,) = await queue.take(1, 2.0)
    await delivery.nak()
    (again,) = await queue.take(1, 0.4)
    assert (again.message, again.num_delivered) == (task("a"), 2)


async def test_a_task_given_back_with_a_delay_comes_later(queue: Queue) -> None:
    await put(queue, "a")
    (delivery,) = await queue.take(1, 2.0)
    start_s = time.monotonic()
    await delivery.nak(delay_s=0.3)
    assert await take_names(queue) == ["a"]
    assert time.monotonic() - start_s >= 0.25


async def test_a_silent_worker_loses_its_task_to_another(
    world: World, queue: Queue, subject: str
) -> None:
    await put(queue, "a")
    await queue.take(1, 2.0)
    other = await (await world.connect()).work_queue(subject, CancelRequest)
    (again,) = await other.take(1, LIMITS.ack_wait_s + 2.0)
    assert again.num_delivered == 2


async def test_in_progress_keeps_a_task(queue: Queue) -> None:
    await put(queue, "a")
    (delivery,) = await queue.take(1, 2.0)
    for _ in range(4):
        await asyncio.sleep(LIMITS.ack_wait_s / 2)
        await delivery.in_progress()
        assert await queue.take(1, 0.0) == []
    await delivery.ack()


async def test_a_cancelled_take_loses_nothing(queue: Queue) -> None:
    num_tasks = 15
    taken: set[str] = set()

    async def producer() -> None:
        for i in range(num_tasks):
            await put(queue, f"t{i}")
            await asyncio.sleep(0.007)

    producing = asyncio.create_task(producer())
    for attempt in range(400):
        taking = asyncio.create_task(queue.take(2, 1.0))
        await asyncio.sleep(0.001 * (attempt % 9))
        taking.cancel()
        try:
            for delivery in await taking:
                assert delivery.num_delivered == 1, "a cancelled take must not cost a delivery"
                taken.add(delivery.message.request_id)
                await delivery.ack()
        except asyncio.CancelledError:
            pass
        if len(taken) == num_tasks:
            break
    await producing
    for delivery in await queue.take(num_tasks, 0.2):
        taken.add(delivery.message.request_id)
        await delivery.ack()
    assert taken == {f"t{i}" for i in range(num_tasks)}


async def test_hurried_workers_neither_lose_nor_repeat_a_task(world: World, subject: str) -> None:
    limits = BusLimits(ack_wait_s=30.0)
    num_tasks, done = 200, list[str]()

    async def worker(seed: int) -> None:
        dice = random.Random(seed)
        queue = await (await world.connect(limits)).work_queue(subject, CancelRequest)
        while len(done) < num_tasks:
            taking = asyncio.create_task(queue.take(dice.randint(1, 5), 0.05))
            if dice.random() < 0.3:
                await asyncio.sleep(dice.random() * 0.004)
                taking.cancel()
            await asyncio.wait([taking])
            for delivery in [] if taking.cancelled() else taking.result():
                done.append(delivery.message.request_id)
                await delivery.ack()

    queue = await (await world.connect(limits)).work_queue(subject, CancelRequest)
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        for seed in range(3):
            group.create_task(worker(seed))
        await put(queue, *(f"t{i}" for i in range(num_tasks)))
    assert sorted(done) == sorted(f"t{i}" for i in range(num_tasks))


async def test_a_full_queue_refuses(queue: Queue) -> None:
    await put(queue, *(f"t{i}" for i in range(LIMITS.queue_max_msgs)))
    with pytest.raises(QueueFull):
        await put(queue, "one-more")
    (delivery,) = await queue.take(1, 2.0)
    await delivery.ack()
    await asyncio.sleep(0.05)
    await put(queue, "one-more")


async def test_a_queue_is_bounded_in_bytes(world: World, subject: str) -> None:
    bus = await world.connect(BusLimits(queue_max_bytes=10_000))
    queue = await bus.work_queue(subject, CancelRequest)
    await queue.put(task("a" * 4000), message_id="a")
    await queue.put(task("b" * 4000), message_id="b")
    with pytest.raises(QueueFull, match="4"):
        await queue.put(task("c" * 4000), message_id="c")


async def test_a_refused_message_id_may_be_put_again(queue: Queue) -> None:
    await put(queue, *(f"t{i}" for i in range(LIMITS.queue_max_msgs)))
    with pytest.raises(QueueFull):
        await put(queue, "late")
    for delivery in await queue.take(5, 2.0):
        await delivery.ack()
    await asyncio.sleep(0.05)
    await put(queue, "late")
    assert "late" in await take_names(queue, LIMITS.queue_max_msgs)


async def listen_for_dead(bus: Bus, subject: str) -> asyncio.Queue[tuple[CancelRequest, Headers]]:
    heard: asyncio.Queue[tuple[CancelRequest, Headers]] = asyncio.Queue()

    async def handler(message: CancelRequest, headers: Headers) -> None:
        heard.put_nowait((message, headers))

    await bus.subscribe(subjects.dead(subject), CancelRequest, handler)
    return heard


async def test_a_rejected_task_becomes_a_dead_letter(
    world: World, queue: Queue, subject: str
) -> None:
    heard = await listen_for_dead(await world.connect(), subject)
    await queue.put(task("a"), message_id="a", headers={"traceparent": "00-1-2-01"})
    (delivery,) = await queue.take(1, 2.0)
    await delivery.reject("bad\nmedia é")
    await delivery.reject("again")
    message, headers = await asyncio.wait_for(heard.get(), 2.0)
    assert message == task("a")
    assert headers["traceparent"] == "00-1-2-01"
    assert headers[REASON_HEADER] == "bad media \\xe9"
    assert headers[DELIVERIES_HEADER] == "1"
    assert await queue.take(1, 0.1) == []
    assert await queue.depth() == 0
    assert heard.empty()


async def test_a_task_given_back_on_its_last_delivery_becomes_a_dead_letter(
    queue: Queue, bus: Bus, subject: str
) -> None:
    heard = await listen_for_dead(bus, subject)
    await put(queue, "a")
    for _ in range(LIMITS.max_deliver):
        (delivery,) = await queue.take(1, 2.0)
        await delivery.nak()
    message, _ = await asyncio.wait_for(heard.get(), 2.0)
    assert message == task("a")


async def test_a_crash_on_the_last_delivery_becomes_a_dead_letter(
    queue: Queue, bus: Bus, subject: str
) -> None:
    heard = await listen_for_dead(bus, subject)
    await put(queue, "a")
    for _ in range(LIMITS.max_deliver):
        assert await take_names(queue, 1, LIMITS.ack_wait_s + 2.0) == ["a"]
    assert await queue.take(1, LIMITS.ack_wait_s + 0.3) == []
    _, headers = await asyncio.wait_for(heard.get(), 2.0)
    assert headers[DELIVERIES_HEADER] == str(LIMITS.max_deliver + 1)
    assert await queue.depth() == 0


async def test_a_task_of_another_type_becomes_a_dead_letter(
    bus: Bus, queue: Queue, subject: str
) -> None:
    other = await bus.work_queue(subject, RequestsAlive)
    gateway = WorkerRef(name="g", incarnation=1)
    await other.put(RequestsAlive(gateway=gateway, request_ids=()), message_id="odd")
    await put(queue, "a")
    taken: list[str] = []
    while not taken:
        taken = await take_names(queue, 2)
    assert taken == ["a"]
    for _ in range(100):
        if await queue.depth() == 1:
            return
        await asyncio.sleep(0.02)
    pytest.fail("the undecodable task is still in the queue")
