"""Workers that change roles, over the in-memory bus and the loopback transport."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from services.stages import HostSettings, StageBuilder
from shared.bus import subjects
from shared.bus.memory_bus import MemoryBus
from shared.bus.memory_hub import MemoryHub
from shared.messages.control import Registration, RoleReport
from shared.messages.descriptor import WorkerRef
from shared.messages.events import EventBatch
from shared.runtime.core_turns import CoreTurns
from shared.runtime.directory import WorkerDirectory
from shared.runtime.host import ModelFolder, open_worker
from shared.runtime.lifecycle import Stop
from shared.runtime.registration import RegistrationHeartbeat
from shared.runtime.role_control import SwitchResult, request_switch
from shared.runtime.role_host import RoleHost
from shared.runtime.role_rules import parse_role
from shared.runtime.role_transport import RoleTransport
from shared.runtime.settings import ModelSettings
from shared.runtime.topology import parse_topology
from shared.transport.loopback import LoopbackNetwork, LoopbackTransport
from tests.support.stages import GATEWAY, MODEL, Pipeline

TTL_S = 5.0


@dataclass
class Hosts(Pipeline):
    """The running workers by name (`w0`, `w1`), and who is registered."""

    hosts: dict[str, RoleHost] = field(default_factory=dict)
    transports: dict[str, RoleTransport] = field(default_factory=dict)
    directory: WorkerDirectory | None = None
    stop: Stop = field(default_factory=Stop)

    def registered(self) -> list[Registration]:
        assert self.directory is not None
        return self.directory.live()

    async def switch(self, name: str, role: str, **options) -> SwitchResult:
        assert self.directory is not None
        return await request_switch(self.bus, self.directory, name, parse_role(role), **options)

    def num_running(self, name: str, stage: str) -> int:
        """Tasks at work in a stage of a worker."""
        value = self.hosts[name].registry.get_sample_value(
            "triptych_num_requests_running", {"stage": stage}
        )
        return int(value or 0)

    def left_over(self) -> dict[str, float]:
        """Leases, blocks and embeddings that are still held, by worker."""
        held: dict[str, float] = {}
        for name, host in self.hosts.items():
            if leases := self.transports[name].counters().leases_open:
                held[f"{name} leases"] = leases
            for family in host.registry.collect():
                if family.name == "triptych_kv_cache_usage_perc":
                    held |= {f"{name} KV": s.value for s in family.samples if s.value}
        return held


@asynccontextmanager
async def running_hosts(
    folder: ModelFolder, topology: str, *, has_tower: bool = True, **settings
) -> AsyncIterator[Hosts]:
    """All workers of a topology, each ready to change its role."""
    hub, network = MemoryHub(), LoopbackNetwork()
    async with AsyncExitStack() as scope:
        bus = MemoryBus(hub)
        scope.push_async_callback(bus.close)
        system = Hosts(bus, folder)
        await bus.subscribe(subjects.events(GATEWAY), EventBatch, system.on_batch)
        system.directory = await scope.enter_async_context(
            WorkerDirectory(bus, ttl_s=TTL_S, model=MODEL)
        )
        tasks = await scope.enter_async_context(asyncio.TaskGroup())
        scope.callback(system.stop.request, "the test is over")
        for number, stages in enumerate(parse_topology(topology)):
            each = HostSettings(
                stages=",".join(stages),
                model=ModelSettings(served_name=MODEL),
                drain_s=1.0,
                **settings,
            )
            me = WorkerRef(name=f"w{number}", incarnation=number + 1)
            compatibility = folder.geometry(each.block_size).compatibility_hash("test")
            transport = RoleTransport(
                await scope.enter_async_context(LoopbackTransport(network, me, compatibility))
            )
            own_bus = MemoryBus(hub)
            registration = Registration(
                worker=me,
                stages=stages,
                model=MODEL,
                compatibility=compatibility,
                host="here",
                pid=number,
                ready=False,
            )
            heartbeat = await scope.enter_async_context(
                RegistrationHeartbeat(own_bus, registration, ttl_s=TTL_S)
            )
            worker = await scope.enter_async_context(
                open_worker(me, stages, each, own_bus, transport, CoreTurns())
            )
            builder = StageBuilder()
            host = RoleHost(
                worker,
                lambda changed, builder=builder, each=each: builder(changed, folder, each),
                transport,
                heartbeat,
                has_tower=has_tower,
                finish_s=each.switch_finish_s,
            )
            system.hosts[me.name], system.transports[me.name] = host, transport
            running = tasks.create_task(host.run(system.stop))
            scope.push_async_callback(_ended, system.stop, running)
        await system.directory.wait_until_served({r for s in parse_topology(topology) for r in s})
        while not all(each.ready for each in system.registered()):
            await asyncio.sleep(0.01)
        yield system


async def _ended(stop: Stop, running: asyncio.Task[None]) -> None:
    """Before a worker's links are closed, its stages have ended."""
    stop.request("the test is over")
    await asyncio.wait([running])


async def reports_of(system: Hosts) -> list[RoleReport]:
    """A list that fills with what workers say of their switches."""
    heard: list[RoleReport] = []

    async def on_report(report: RoleReport, headers: object) -> None:
        heard.append(report)

    await system.bus.subscribe(subjects.ROLE_REPORTS, RoleReport, on_report)
    return heard
