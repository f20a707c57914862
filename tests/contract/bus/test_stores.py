"""What key-value buckets and object stores promise."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from shared.bus.base import Bus, KeyValue, KeyValueEntry
from shared.errors import ObjectMissing, QueueFull
from tests.contract.bus.conftest import World

MIB = 1024 * 1024


@pytest.fixture
async def bucket(world: World, bus: Bus) -> KeyValue:
    return await bus.key_value(world.name("kv"), ttl_s=60.0)


async def next_of(watch: AsyncIterator[KeyValueEntry]) -> tuple[str, bytes | None]:
    entry = await asyncio.wait_for(anext(watch), 5.0)
    return entry.key, entry.value


async def test_a_key_is_put_read_replaced_and_deleted(bucket: KeyValue) -> None:
    assert await bucket.get("a") is None
    await bucket.put("a", b"1")
    await bucket.put("a", b"2")
    assert await bucket.get("a") == b"2"
    await bucket.delete("a")
    await bucket.delete("a")
    assert await bucket.get("a") is None


async def test_empty_values_are_values(bucket: KeyValue) -> None:
    await bucket.put("a", b"")
    assert await bucket.get("a") == b""


async def test_a_watch_tells_what_is_there_then_what_changes(
    world: World, bucket: KeyValue
) -> None:
    await bucket.put("a", b"1")
    other = await (await world.connect()).key_value(world.name("kv"), ttl_s=60.0)
    async with aclosing(bucket.watch()) as watch:
        assert await next_of(watch) == ("a", b"1")
        await other.put("b", b"2")
        assert await next_of(watch) == ("b", b"2")
        await other.delete("a")
        assert await next_of(watch) == ("a", None)


async def test_a_watch_of_an_empty_bucket_waits(bucket: KeyValue) -> None:
    async with aclosing(bucket.watch()) as watch:
        waiting = asyncio.create_task(next_of(watch))
        await asyncio.sleep(0.1)
        await bucket.put("a", b"1")
        assert await waiting == ("a", b"1")


async def test_many_entries_are_all_told(bucket: KeyValue) -> None:
    for i in range(600):
        await bucket.put(f"k{i}", b"v")
    async with aclosing(bucket.watch()) as watch:
        told = {(await next_of(watch))[0] for _ in range(600)}
    assert told == {f"k{i}" for i in range(600)}


async def test_a_key_lapses_unless_it_is_put_again(world: World, bus: Bus) -> None:
    bucket = await bus.key_value(world.name("short"), ttl_s=1.0)
    async with aclosing(bucket.watch()) as watch:
        await bucket.put("a", b"1")
        told = [await next_of(watch)]
        await bucket.put("b", b"1")
        await asyncio.sleep(0.6)
        await bucket.put("b", b"2")
        await asyncio.sleep(0.7)
        assert await bucket.get("a") is None
        assert await bucket.get("b") == b"2"
        told += [await next_of(watch) for _ in range(3)]
    assert told == [("a", b"1"), ("b", b"1"), ("b", b"2"), ("a", None)]


async def test_closing_the_bus_ends_a_watch(world: World) -> None:
    bus = await world.connect()
    bucket = await bus.key_value(world.name("kv"), ttl_s=60.0)

    async def drain() -> int:
        return len([entry async for entry in bucket.watch()])

    draining = asyncio.create_task(drain())
    await bucket.put("a", b"1")
    await asyncio.sleep(0.1)
    await bus.close()
    assert await asyncio.wait_for(draining, 5.0) == 1


@pytest.mark.parametrize("num_bytes", [0, 1, 50_000, MIB // 2, MIB // 2 + 1, 10 * MIB])
async def test_an_object_is_stored_and_read_by_another(world: World, num_bytes: int) -> None:
    writer, reader = [
        await (await world.connect()).object_store(
            world.name("media"), ttl_s=60.0, max_bytes=64 * MIB
        )
        for _ in range(2)
    ]
    data = os.urandom(num_bytes)
    await writer.put("a", data)
    assert await reader.get("a") == data


async def test_a_missing_object_is_named(world: World, bus: Bus) -> None:
    store = await bus.object_store(world.name("media"), ttl_s=60.0, max_bytes=MIB)
    with pytest.raises(ObjectMissing, match="nothing-here"):
        await store.get("nothing-here")


async def test_an_object_expires_unless_it_is_put_again(world: World, bus: Bus) -> None:
    store = await bus.object_store(world.name("media"), ttl_s=1.0, max_bytes=MIB)
    await store.put("kept", b"k")
    await store.put("dropped", b"d")
    await asyncio.sleep(0.7)
    await store.put("kept", b"k")
    await asyncio.sleep(0.6)
    assert await store.get("kept") == b"k"
    with pytest.raises(ObjectMissing):
        await store.get("dropped")


async def test_storing_again_takes_no_room(world: World, bus: Bus) -> None:
    store = await bus.object_store(world.name("media"), ttl_s=60.0, max_bytes=2 * MIB)
    data = os.urandom(MIB)
    for _ in range(5):
        await store.put("a", data)
    with pytest.raises(QueueFull, match="full"):
        await store.put("b", os.urandom(MIB + MIB // 2))
    assert await store.get("a") == data
    with pytest.raises(ObjectMissing):
        await store.get("b")
    await store.put("c", os.urandom(MIB // 2))
