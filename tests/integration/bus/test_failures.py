"""What the NATS bus does when the server or a worker goes away."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from services.launcher.ports import free_port
from shared.bus.limits import BusLimits, Storage
from shared.bus.nats_bus import NatsBus
from shared.errors import BusError
from shared.messages.control import CancelRequest
from tests.support.nats_server import NatsServer

LIMITS = BusLimits(ack_wait_s=0.6, max_deliver=2)


def task(name: str) -> CancelRequest:
    return CancelRequest(request_id=name, attempt=0)


async def test_no_server_is_a_bus_error() -> None:
    limits = BusLimits(connect_timeout_s=0.5)
    with pytest.raises(BusError, match="connect"):
        await NatsBus.connect(f"nats://127.0.0.1:{free_port()}", name="test", limits=limits)


@pytest.mark.parametrize("storage", list(Storage))
async def test_a_waiting_take_survives_a_restart(
    own_nats_server: NatsServer, storage: Storage
) -> None:
    limits = BusLimits(storage=storage)
    async with await NatsBus.connect(own_nats_server.url, name="test", limits=limits) as bus:
        queue = await bus.work_queue("work.decode.m", CancelRequest)
        taking = asyncio.create_task(queue.take(1, 30.0))
        await asyncio.sleep(0.1)
        await asyncio.to_thread(own_nats_server.kill)
        await asyncio.to_thread(own_nats_server.start)
        await put_when_possible(queue.put, "a")
        (delivery,) = await asyncio.wait_for(taking, 10.0)
        assert delivery.message == task("a")
        await delivery.ack()


async def test_tasks_on_disk_survive_a_restart(own_nats_server: NatsServer) -> None:
    limits = BusLimits(storage=Storage.FILE)
    async with await NatsBus.connect(own_nats_server.url, name="test", limits=limits) as bus:
        queue = await bus.work_queue("work.decode.m", CancelRequest)
        await queue.put(task("a"), message_id="a")
        await asyncio.to_thread(own_nats_server.stop)
        await asyncio.to_thread(own_nats_server.start)
        deliveries = await queue.take(1, 10.0)
        assert [d.message for d in deliveries] == [task("a")]


async def test_events_and_watches_go_on_after_a_restart(own_nats_server: NatsServer) -> None:
    heard: asyncio.Queue[str] = asyncio.Queue()

    async def handler(message: CancelRequest, _headers: object) -> None:
        heard.put_nowait(message.request_id)

    async with await NatsBus.connect(own_nats_server.url, name="test") as bus:
        await bus.subscribe("control.cancel", CancelRequest, handler)
        bucket = await bus.key_value("workers", ttl_s=60.0)
        await bucket.put("lost", b"1")
        async with aclosing(bucket.watch()) as watch:
            assert (await anext(watch)).key == "lost"
            await asyncio.to_thread(own_nats_server.kill)
            await asyncio.to_thread(own_nats_server.start)
            # The bucket lived in memory: the restart lost the key, and the watch must say so.
            entry = await asyncio.wait_for(anext(watch), 10.0)
            assert (entry.key, entry.value) == ("lost", None)
            await bucket.put("new", b"2")
            entry = await asyncio.wait_for(anext(watch), 10.0)
            assert (entry.key, entry.value) == ("new", b"2")
        await bus.publish("control.cancel", task("after"))
        assert await asyncio.wait_for(heard.get(), 5.0) == "after"


WORKER = """
import asyncio, sys
from shared.bus.nats_bus import NatsBus
from shared.messages.control import CancelRequest
from tests.integration.bus.test_failures import LIMITS

async def main() -> None:
    bus = await NatsBus.connect(sys.argv[1], name="victim", limits=LIMITS)
    queue = await bus.work_queue(sys.argv[2], CancelRequest)
    await queue.take(1, 20.0)
    print("taken", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_a_killed_workers_task_is_redelivered(
    nats_server: NatsServer, repository: Path
) -> None:
    subject = f"work.decode.{uuid.uuid4().hex}"
    async with await NatsBus.connect(nats_server.url, name="test", limits=LIMITS) as bus:
        queue = await bus.work_queue(subject, CancelRequest)
        await queue.put(task("a"), message_id="a")
        worker = await asyncio.create_subprocess_exec(
            sys.executable, "-c", WORKER, nats_server.url, subject,
            cwd=repository, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert worker.stdout is not None
        assert await asyncio.wait_for(worker.stdout.readline(), 20.0) == b"taken\n"
        worker.kill()
        await worker.communicate()
        (delivery,) = await queue.take(1, 5.0)
        assert (delivery.message, delivery.num_delivered) == (task("a"), 2)
        await delivery.ack()


@pytest.fixture
def small_server() -> Iterator[NatsServer]:
    with tempfile.TemporaryDirectory() as folder:
        server = NatsServer(Path(folder), max_payload_bytes=64 * 1024)
        server.start()
        yield server
        server.stop()


async def test_a_server_with_a_small_payload_limit_is_named(
    small_server: NatsServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with await NatsBus.connect(small_server.url, name="test") as bus:
        assert "at most 65536 bytes" in caplog.text
        with pytest.raises(BusError, match=r"1000\d\d bytes"):
            await bus.publish("control.cancel", task("x" * 100_000))
        queue = await bus.work_queue("work.decode.m", CancelRequest)
        with pytest.raises(BusError, match=r"1000\d\d bytes"):
            await queue.put(task("x" * 100_000), message_id="a")


async def test_other_clients_can_read_our_objects(nats_server: NatsServer) -> None:
    import nats

    name = f"media-{uuid.uuid4().hex}"
    data = bytes(range(256)) * 5000
    async with await NatsBus.connect(nats_server.url, name="test") as bus:
        store = await bus.object_store(name, ttl_s=60.0, max_bytes=8 * 1024 * 1024)
        await store.put("picture", data)
    client = await nats.connect(nats_server.url)
    try:
        jetstream = client.jetstream()
        metadata = await jetstream.get_last_msg(f"OBJ_{name}", f"$O.{name}.M.cGljdHVyZQ==")
        assert json.loads(metadata.data or b"")["size"] == len(data)
        stored = await (await jetstream.object_store(name)).get("picture")
        assert stored.data == data
    finally:
        await client.close()


async def put_when_possible(put: object, name: str) -> None:
    for _ in range(50):
        try:
            await put(task(name), message_id=name)  # type: ignore[operator]
        except BusError:
            await asyncio.sleep(0.1)
        else:
            return
    pytest.fail("the queue did not come back")
