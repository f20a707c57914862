"""A gateway over the in-memory bus, and workers that follow a script."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager

import httpx
import pytest
from PIL import Image

from services.gateway.app import make_app
from services.gateway.gateway import open_gateway
from services.gateway.model import ServedModel
from services.gateway.settings import GatewaySettings, RecoverySettings
from shared.bus import subjects
from shared.bus.memory_bus import MemoryBus
from shared.bus.memory_hub import MemoryHub
from shared.errors import FailureKind
from shared.messages.control import CancelRequest, Registration, RequestsAlive, Role
from shared.messages.descriptor import RequestDescriptor, WorkerRef
from shared.messages.events import EventBatch, FailedEvent, FinishedEvent, FinishReason, TokenEvent
from shared.messages.work import EncodeTask, PrefillTask
from shared.runtime.settings import DEMO_MODEL

MODEL = "demo"
ME = WorkerRef(name="gateway", incarnation=1)
FAST = GatewaySettings(
    recovery=RecoverySettings(max_attempts=3, first_event_s=1.0, stall_s=0.6, gap_s=0.2)
)
Behaviour = Callable[["FakeWorkers", RequestDescriptor], Awaitable[None]]


@pytest.fixture(scope="session")
def model() -> ServedModel:
    return ServedModel.load(MODEL, DEMO_MODEL)


class FakeWorkers:
    """All stages in one task: takes from the queues and lets `behaviour` answer."""

    def __init__(self, bus: MemoryBus, model: ServedModel, behaviour: Behaviour) -> None:
        self.bus, self.model, self.behaviour = bus, model, behaviour
        self.missing: set[Role] = set()
        self.gone: set[WorkerRef] = set()
        self.registered: list[Registration] = []
        self.encode_tasks: list[EncodeTask] = []
        self.requests: list[RequestDescriptor] = []
        self.headers: list[dict[str, str]] = []
        self.cancelled: list[CancelRequest] = []
        self.alive: list[RequestsAlive] = []
        self.worker = WorkerRef(name="decode-0", incarnation=1)

    # What the gateway asks of the directory.
    def is_served(self, role: Role) -> bool:
        return role not in self.missing

    def live(self) -> list[Registration]:
        return list(self.registered)

    async def until(self, ready: Callable[[], bool]) -> None:
        while not ready():
            await asyncio.sleep(0.001)

    def is_gone(self, worker: WorkerRef) -> bool:
        return worker in self.gone

    async def run(self) -> None:
        async def on_cancel(message, headers):
            self.cancelled.append(message)

        async def on_alive(message, headers):
            self.alive.append(message)

        await self.bus.subscribe(subjects.CANCEL, CancelRequest, on_cancel)
        await self.bus.subscribe(subjects.ALIVE, RequestsAlive, on_alive)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._take_encode())
            group.create_task(self._take_prefill(group))

    async def _take_encode(self) -> None:
        queue = await self.bus.work_queue(subjects.work(Role.ENCODE, MODEL), EncodeTask)
        while True:
            for delivery in await queue.take(8, 1.0):
                self.encode_tasks.append(delivery.message)
                await delivery.ack()

    async def _take_prefill(self, group: asyncio.TaskGroup) -> None:
        queue = await self.bus.work_queue(subjects.work(Role.PREFILL, MODEL), PrefillTask)
        while True:
            for delivery in await queue.take(8, 1.0):
                self.requests.append(delivery.message.request)
                self.headers.append(dict(delivery.headers))
                await delivery.ack()
                group.create_task(self.behaviour(self, delivery.message.request))

    async def send(self, request: RequestDescriptor, *events) -> None:
        batch = EventBatch(worker=self.worker, events=events)
        await self.bus.publish(subjects.events(request.gateway), batch)

    async def tokens(self, request: RequestDescriptor, text: str, start: int = 0) -> int:
        """Send a text's tokens from index `start` on; returns the next index."""
        ids = self.model.tokenizer.encode_text(text)
        for index, token_id in enumerate(ids[start:], start):
            await self.send(request, token(request, index, token_id))
        return len(ids)

    async def finish(self, request: RequestDescriptor, num_tokens: int, reason="stop") -> None:
        await self.send(
            request,
            FinishedEvent(
                request_id=request.request_id,
                attempt=request.attempt,
                num_tokens=num_tokens,
                reason=FinishReason(reason),
            ),
        )

    async def fail(self, request: RequestDescriptor, kind: FailureKind, retryable: bool) -> None:
        await self.send(
            request,
            FailedEvent(
                request_id=request.request_id,
                attempt=request.attempt,
                kind=kind,
                message="the worker's own words",
                retryable=retryable,
            ),
        )


def token(request: RequestDescriptor, index: int, token_id: int) -> TokenEvent:
    return TokenEvent(
        request_id=request.request_id, attempt=request.attempt, index=index, token_id=token_id
    )


def says(text: str) -> Behaviour:
    """Workers that answer with this text."""

    async def behaviour(workers: FakeWorkers, request: RequestDescriptor) -> None:
        await workers.finish(request, await workers.tokens(request, text))

    return behaviour


class System:
    """The gateway's parts, its workers, and a client."""

    def __init__(self, parts, workers: FakeWorkers, hub: MemoryHub) -> None:
        self.parts, self.workers, self.hub = parts, workers, hub
        self.app = make_app(parts)
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://gateway")

    async def post(self, body=None, **extra) -> httpx.Response:
        return await self.client.post("/v1/chat/completions", json=body or question(**extra))

    async def settle(self) -> None:
        """Let events and cancellations arrive."""
        for _ in range(20):
            await asyncio.sleep(0.005)


def question(text: str = "How many?", **extra) -> dict:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **extra}


def picture_url(color: str = "red", size=(56, 56), kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, kind)
    return data_url(buffer.getvalue())


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def with_pictures(*urls: str, **extra) -> dict:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [*parts, {"type": "text", "text": "What is it?"}]
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], **extra}


@pytest.fixture
def start(model):
    """`async with start(behaviour, settings) as system`."""

    @asynccontextmanager
    async def starting(behaviour=None, settings=FAST, limits=None, served=model, **options):
        hub = MemoryHub(limits)
        async with MemoryBus(hub) as bus:
            workers = FakeWorkers(bus, served, behaviour or says("three cats"))
            running = asyncio.create_task(workers.run())
            async with open_gateway(settings, served, bus, workers, ME, **options) as parts:
                system = System(parts, workers, hub)
                await asyncio.sleep(0)
                yield system
                await system.client.aclose()
                # Whatever happened, nothing is left behind.
                await system.settle()
                assert parts.chat.admission.num_in_flight == 0
                assert parts.chat.admission.held_bytes == 0
                assert parts.chat.runner.streams.live_ids == ()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    return starting
