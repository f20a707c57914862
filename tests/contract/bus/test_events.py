"""What publish and subscribe promise."""

from __future__ import annotations

import asyncio

import pytest

from shared.bus.base import Bus, Headers
from shared.errors import ProtocolError
from shared.messages.control import CancelRequest, RequestsAlive
from shared.messages.descriptor import WorkerRef
from tests.contract.bus.conftest import World


class Listener:
    def __init__(self) -> None:
        self.heard: list[tuple[str, Headers]] = []
        self._changed = asyncio.Event()

    async def __call__(self, message: CancelRequest, headers: Headers) -> None:
        await asyncio.sleep(0)
        self.heard.append((message.request_id, headers))
        self._changed.set()

    async def names(self, count: int) -> list[str]:
        while len(self.heard) < count:
            self._changed.clear()
            await asyncio.wait_for(self._changed.wait(), 5.0)
        return [name for name, _ in self.heard]


def event(name: str) -> CancelRequest:
    return CancelRequest(request_id=name, attempt=0)


async def test_every_subscriber_hears_every_event_in_order(world: World) -> None:
    publisher, first, second = [await world.connect() for _ in range(3)]
    subject = world.name("control")
    listeners = Listener(), Listener()
    await first.subscribe(subject, CancelRequest, listeners[0])
    await second.subscribe(subject, CancelRequest, listeners[1])
    names = [f"r{i}" for i in range(50)]
    for name in names:
        await publisher.publish(subject, event(name), {"traceparent": name})
    for listener in listeners:
        assert await listener.names(50) == names
        assert listener.heard[7][1] == {"traceparent": "r7"}


async def test_a_wildcard_hears_matching_subjects(world: World, bus: Bus) -> None:
    listener = Listener()
    await bus.subscribe(f"{world.name('e')}.*.b", CancelRequest, listener)
    await bus.publish(f"{world.name('e')}.x.c", event("no"))
    await bus.publish(f"{world.name('e')}.x.b", event("yes"))
    assert await listener.names(1) == ["yes"]


async def test_a_closed_subscription_hears_nothing(world: World, bus: Bus) -> None:
    closed, open_ = Listener(), Listener()
    subscription = await bus.subscribe(world.name("e"), CancelRequest, closed)
    await bus.subscribe(world.name("e"), CancelRequest, open_)
    await subscription.close()
    await subscription.close()
    await bus.publish(world.name("e"), event("a"))
    assert await open_.names(1) == ["a"]
    assert closed.heard == []


async def test_a_failing_handler_and_a_foreign_message_do_not_end_a_subscription(
    world: World, bus: Bus
) -> None:
    listener = Listener()

    async def handler(message: CancelRequest, headers: Headers) -> None:
        if message.request_id == "bad":
            raise ValueError("a bug")
        await listener(message, headers)

    await bus.subscribe(world.name("e"), CancelRequest, handler)
    gateway = WorkerRef(name="g", incarnation=1)
    await bus.publish(world.name("e"), RequestsAlive(gateway=gateway, request_ids=()))
    await bus.publish(world.name("e"), event("bad"))
    await bus.publish(world.name("e"), event("good"))
    assert await listener.names(1) == ["good"]


async def test_a_message_above_the_limit_is_refused(world: World, bus: Bus) -> None:
    with pytest.raises(ProtocolError, match="limit"):
        await bus.publish(world.name("e"), event("x" * (4 * 1024 * 1024)))


async def test_a_large_message_arrives(world: World, bus: Bus) -> None:
    listener = Listener()
    await bus.subscribe(world.name("e"), CancelRequest, listener)
    name = "x" * (4 * 1024 * 1024 - 100)
    await bus.publish(world.name("e"), event(name))
    assert await listener.names(1) == [name]


async def test_close_is_idempotent(bus: Bus) -> None:
    await bus.close()
    await bus.close()
