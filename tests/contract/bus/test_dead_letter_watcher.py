"""A gateway hears of tasks that were given up."""

from __future__ import annotations

import asyncio

from shared.bus.base import Bus
from shared.bus.dead_letters import DeadLetter, DeadLetterWatcher
from shared.messages.descriptor import MediaItem, WorkerRef
from shared.messages.work import EncodeTask
from tests.contract.bus.conftest import World

TASK = EncodeTask(
    request_id="r1",
    attempt=0,
    gateway=WorkerRef(name="g", incarnation=1),
    model="m",
    item=MediaItem(
        kind="image",
        sha256="0" * 64,
        content_key="1" * 64,
        grid_thw=(1, 2, 2),
        offset=0,
        num_tokens=1,
    ),
    deadline_unix_s=0.0,
)


async def test_the_handler_gets_the_task_and_the_reason(world: World, bus: Bus) -> None:
    subject = f"work.encode.{world.name('m')}"
    heard: asyncio.Queue[DeadLetter] = asyncio.Queue()
    async with DeadLetterWatcher(await world.connect(), {subject: EncodeTask}, heard.put):
        queue = await bus.work_queue(subject, EncodeTask)
        await queue.put(TASK, message_id="r1")
        (delivery,) = await queue.take(1, 2.0)
        await delivery.reject("not a picture")
        letter = await asyncio.wait_for(heard.get(), 2.0)
    assert letter == DeadLetter(task=TASK, reason="not a picture", num_delivered=1)
