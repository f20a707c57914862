"""`triptych planner` as a service: over a real server, with its metrics over HTTP."""

from __future__ import annotations

import asyncio

import httpx

from services.launcher.ports import free_port
from services.planner.online.command import serve
from services.planner.online.settings import PlannerSettings
from shared.bus import subjects
from shared.bus.nats_bus import NatsBus
from shared.messages.control import Registration, Role
from shared.messages.descriptor import WorkerRef
from shared.messages.work import DecodeTask
from shared.runtime.lifecycle import Stop
from shared.runtime.registration import RegistrationHeartbeat
from shared.runtime.settings import BusSettings, ModelSettings
from tests.support.nats_server import NatsServer

MODEL = "advised"


async def test_advises_over_nats(nats_server: NatsServer) -> None:
    port = free_port()
    settings = PlannerSettings(
        bus=BusSettings(url=nats_server.url),
        model=ModelSettings(served_name=MODEL),
        advise=True,
        interval_s=0.05,
        metrics_port=port,
    )
    bus = await NatsBus.connect(nats_server.url, name="test")
    stop = Stop()
    registration = Registration(
        worker=WorkerRef(name="bridge", incarnation=1),
        stages=(Role.PREFILL, Role.DECODE),
        model=MODEL,
        compatibility="c",
        host="h",
        pid=1,
        ready=True,
    )
    async with bus, RegistrationHeartbeat(bus, registration, ttl_s=6.0):
        await bus.work_queue(subjects.work(Role.DECODE, MODEL), DecodeTask)
        service = asyncio.create_task(serve(settings, stop))
        try:
            async with asyncio.timeout(30.0), httpx.AsyncClient(trust_env=False) as client:
                text = ""
                while 'desired_workers{stage="decode"} 1.0' not in text:
                    await asyncio.sleep(0.05)
                    if service.done():
                        break
                    try:
                        text = (await client.get(f"http://127.0.0.1:{port}/metrics")).text
                    except httpx.ConnectError:
                        continue
        finally:
            stop.request("the test is over")
            await service
    assert 'triptych_planner_desired_workers{stage="encode"} 0.0' in text
    assert 'triptych_planner_queue_depth{stage="decode"} 0.0' in text
