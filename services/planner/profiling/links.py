"""Times hops and transfers between two processes: a real NATS server and real UCX.

In: the address of a NATS server. Out: `Links`, all but `gateway_s`. The other process echoes
what is queued and what is published, and exposes memory to be pulled.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
import time
import uuid
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection

import numpy as np

from services.planner.cluster import Links
from services.planner.fit import fit
from shared.bus.base import Bus, Headers
from shared.bus.nats_bus import NatsBus
from shared.errors import TriptychError
from shared.messages.codec import decode, encode
from shared.messages.control import CancelRequest
from shared.messages.descriptor import WorkerRef
from shared.messages.events import TokenEvent
from shared.messages.refs import TensorRef
from shared.runtime.compute import ComputeThread
from shared.runtime.events import EventSink
from shared.transport.base import Segment
from shared.transport.ucx import UcxTransport

KIB, MIB = 1 << 10, 1 << 20
PULL_BYTES = (4 * KIB, 64 * KIB, 512 * KIB, 2 * MIB, 8 * MIB, 32 * MIB)
PICTURE_BYTES = 256 * KIB
STORE_BYTES = 64 * MIB
STORE_TTL_S = 60.0
NUM_WARM_UPS = 3
ANSWER_TIMEOUT_S = 20.0
NUM_LINKS_STEPS = len(PULL_BYTES) + 4
COMPATIBILITY = "profile"
ME = WorkerRef(name="profile", incarnation=1)
HOLDER = "profile"


async def measure_links(nats_url: str, repeats: int, on_step: Callable[[], None]) -> Links:
    """Raises `TriptychError` where the bus or the other process stays silent."""
    prefix = f"profile-{uuid.uuid4().hex[:12]}"
    ours, theirs = multiprocessing.Pipe()
    peer = multiprocessing.get_context("spawn").Process(
        target=_run_peer, args=(theirs, nats_url, prefix), daemon=True
    )
    peer.start()
    try:
        if not await asyncio.to_thread(ours.poll, ANSWER_TIMEOUT_S):
            raise TriptychError(f"the process to measure against is silent: {ANSWER_TIMEOUT_S:g} s")
        ref = decode(await asyncio.to_thread(ours.recv), TensorRef)
        bus = await NatsBus.connect(nats_url, name=prefix)
        try:
            return await _measure(bus, prefix, ref, repeats, on_step)
        finally:
            await bus.close()
    except EOFError:
        raise TriptychError("the process to measure against has ended at its start") from None
    finally:
        peer.terminate()
        await asyncio.to_thread(peer.join)


async def _measure(
    bus: Bus, prefix: str, ref: TensorRef, repeats: int, on_step: Callable[[], None]
) -> Links:
    echo = _Echo(bus, prefix)
    await echo.open()
    try:
        there_and_back_s = await _median(echo.published, repeats, on_step)
        queued_s = await _median(echo.queued, repeats, on_step)
    finally:
        await echo.close()
    step_s = await _step_s(bus, repeats, on_step)
    store_s = await _store_s(bus, prefix, repeats, on_step)
    pulls = await _pulls(ref, repeats, on_step)
    per_pull_s, per_byte_s = fit(
        "pull", [(n,) for n, _ in pulls], [s for _, s in pulls]
    ).coefficients
    token_hop_s = there_and_back_s / 2
    return Links(
        queue_hop_s=max(0.0, queued_s - token_hop_s),
        token_hop_s=token_hop_s,
        pull_s=per_pull_s,
        # So fast that its bytes do not show beside the fixed time: as the largest was measured.
        bytes_per_s=1 / per_byte_s if per_byte_s else pulls[-1][0] / pulls[-1][1],
        store_s=store_s,
        step_s=step_s,
    )


class _Echo:
    """Sends to the other process and waits for what comes back."""

    def __init__(self, bus: Bus, prefix: str) -> None:
        self._bus = bus
        self._prefix = prefix
        self._came = asyncio.Event()
        self._number = 0

    async def open(self) -> None:
        async def on_event(message: CancelRequest, headers: Headers) -> None:
            if message.attempt == self._number:
                self._came.set()

        self._subscription = await self._bus.subscribe(
            f"{self._prefix}.back", CancelRequest, on_event
        )
        self._queue = await self._bus.work_queue(f"work.{self._prefix}", CancelRequest)

    async def close(self) -> None:
        await self._subscription.close()

    async def published(self) -> None:
        """A core message there and one back."""
        await self._bus.publish(f"{self._prefix}.there", self._next())
        await self._answer()

    async def queued(self) -> None:
        """A task there, through its queue, and a core message back."""
        message = self._next()
        await self._queue.put(message, message_id=f"{self._prefix}:{self._number}")
        await self._answer()

    def _next(self) -> CancelRequest:
        self._number += 1
        self._came.clear()
        return CancelRequest(request_id="profile", attempt=self._number)

    async def _answer(self) -> None:
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await self._came.wait()
        except TimeoutError:
            raise TriptychError(f"no answer over the bus in {ANSWER_TIMEOUT_S:g} s") from None


async def _step_s(bus: Bus, repeats: int, on_step: Callable[[], None]) -> float:
    """What surrounds the computing of a step: to the compute thread and back, and one event."""
    events = EventSink(bus, ME)
    token = TokenEvent(request_id="profile", attempt=0, index=0, token_id=0)
    with ComputeThread() as compute:

        async def step() -> None:
            await compute(lambda: None)
            await events.publish([(ME, token)])

        return await _median(step, repeats, on_step)


async def _store_s(bus: Bus, prefix: str, repeats: int, on_step: Callable[[], None]) -> float:
    """One picture into the media store, or out of it."""
    store = await bus.object_store(prefix, ttl_s=STORE_TTL_S, max_bytes=STORE_BYTES)
    number = 0

    async def put_and_get() -> None:
        nonlocal number
        number += 1
        data = number.to_bytes(8, "little") * (PICTURE_BYTES // 8)
        await store.put(f"picture-{number}", data)
        await store.get(f"picture-{number}")

    return await _median(put_and_get, min(repeats, 20), on_step) / 2


async def _pulls(
    ref: TensorRef, repeats: int, on_step: Callable[[], None]
) -> list[tuple[int, float]]:
    samples = []
    async with UcxTransport(ME, COMPATIBILITY) as transport:
        for index, num_bytes in enumerate(PULL_BYTES):
            landing = np.zeros(num_bytes, np.uint8)

            async def pull(index: int = index, landing: object = landing) -> None:
                await transport.pull(ref, index, landing, timeout_s=ANSWER_TIMEOUT_S)

            samples.append((num_bytes, await _median(pull, repeats, on_step)))
    return samples


async def _median(
    step: Callable[[], Awaitable[None]], repeats: int, on_step: Callable[[], None]
) -> float:
    times_s = []
    for number in range(repeats + NUM_WARM_UPS):
        started_s = time.perf_counter()
        await step()
        if number >= NUM_WARM_UPS:
            times_s.append(time.perf_counter() - started_s)
    on_step()
    return statistics.median(times_s)


def _run_peer(pipe: Connection, nats_url: str, prefix: str) -> None:
    asyncio.run(_serve_peer(pipe, nats_url, prefix))


async def _serve_peer(pipe: Connection, nats_url: str, prefix: str) -> None:
    """The other process: answers until it is terminated."""
    bus = await NatsBus.connect(nats_url, name=f"{prefix}-peer")
    back = f"{prefix}.back"

    async def echo(message: CancelRequest, headers: Headers) -> None:
        await bus.publish(back, message)

    await bus.subscribe(f"{prefix}.there", CancelRequest, echo)
    queue = await bus.work_queue(f"work.{prefix}", CancelRequest)
    async with UcxTransport(WorkerRef(name="peer", incarnation=1), COMPATIBILITY) as transport:
        segments = [_segment(np.ones(size, np.uint8)) for size in PULL_BYTES]
        ref = transport.expose("profile", segments, holders=[HOLDER], on_release=lambda: None)
        pipe.send(encode(ref))
        while True:
            for delivery in await queue.take(1, 1.0):
                await bus.publish(back, delivery.message)
                await delivery.ack()
            transport.extend([HOLDER])


def _segment(value: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> Segment:
    return Segment(value.nbytes, lambda: value, is_instant=value.nbytes <= MIB)
