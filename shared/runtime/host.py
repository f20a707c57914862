"""A worker process from start to end: connect, register, serve in one role after the other, leave.

In: the stages to host first, their settings, and a function that builds stages. The process is
registered from the start and says `ready` only when its stages take tasks; its registration lapses
by itself when the process dies. Knows all links of a worker and nothing of what a stage does.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from prometheus_client import CollectorRegistry

from shared.bus import subjects
from shared.bus.base import Bus, Headers
from shared.cache.geometry import KvGeometry
from shared.messages.control import CancelRequest, Registration, RequestsAlive, Role
from shared.messages.descriptor import WorkerRef
from shared.model.kernels.choice import KernelChoice
from shared.modelspec import ModelSpec
from shared.runtime.cancellations import Cancellations
from shared.runtime.compute import ComputeThread
from shared.runtime.connection import connect_bus, new_identity
from shared.runtime.core_turns import CoreTurns
from shared.runtime.events import EventSink
from shared.runtime.lifecycle import Stop
from shared.runtime.model_dir import find_model_dir
from shared.runtime.registration import RegistrationHeartbeat
from shared.runtime.role_host import RoleHost
from shared.runtime.role_transport import RoleTransport
from shared.runtime.topology import name_of
from shared.runtime.worker import Stage, Worker
from shared.runtime.worker_settings import WorkerSettings
from shared.telemetry import logs, tracing
from shared.telemetry.http import Health, TelemetryEndpoint
from shared.telemetry.metrics import TaskMetrics, TransportCollector
from shared.transport.base import Transport
from shared.transport.ucx import UcxTransport

logger = logging.getLogger(__name__)

S = TypeVar("S", bound=WorkerSettings, contravariant=True)


@dataclass(frozen=True)
class ModelFolder:
    """A model as one process will run it."""

    directory: Path
    spec: ModelSpec
    dtype: str
    device: str
    kernels: KernelChoice = field(default_factory=KernelChoice)
    deterministic: bool = False

    def geometry(self, block_size: int) -> KvGeometry:
        """The shape of the KV cache."""
        return KvGeometry.of(self.spec.text, block_size=block_size, dtype=self.dtype)


class BuildStage(Protocol[S]):
    """Loads the stages' part of the weights and joins them to a worker. Runs in the event loop."""

    def __call__(self, worker: Worker, folder: ModelFolder, settings: S) -> Awaitable[Stage]: ...


async def serve_worker(
    stages: tuple[Role, ...], settings: S, build: BuildStage[S], stop: Stop
) -> None:
    """Run one worker until a stop is requested."""
    kind = name_of(stages)
    me = new_identity(settings.name, kind)
    telemetry = settings.telemetry
    logs.setup_logging(telemetry.log_level.upper(), telemetry.log_format, me.name)
    folder = await asyncio.to_thread(open_model, settings)
    async with AsyncExitStack() as scope:
        bus = await scope.enter_async_context(await connect_bus(settings.bus, me))
        await scope.enter_async_context(
            tracing.setup_tracing(kind, me.name, bus, otlp_endpoint=telemetry.otlp_endpoint)
        )
        compatibility = folder.geometry(settings.block_size).compatibility_hash(
            folder.spec.fingerprint
        )
        transport = RoleTransport(
            await scope.enter_async_context(_transport(me, compatibility, settings))
        )
        heartbeat = await scope.enter_async_context(
            RegistrationHeartbeat(
                bus,
                _registration(me, stages, settings, compatibility),
                ttl_s=settings.registration_ttl_s,
            )
        )
        cores = core_turns(settings, folder.device)
        worker = await scope.enter_async_context(
            open_worker(me, stages, settings, bus, transport, cores)
        )
        await give_team(worker.compute, settings.compute.threads)
        host = RoleHost(
            worker,
            lambda changed: build(changed, folder, settings),
            transport,
            heartbeat,
            has_tower=folder.spec.has_tower,
            finish_s=settings.switch_finish_s,
        )
        await scope.enter_async_context(
            TelemetryEndpoint(
                host.registry,
                lambda: Health(ready=heartbeat.registration.ready),
                host=settings.metrics_host,
                port=settings.metrics_port,
            )
        )
        await host.run(stop)
        await transport.collected(settings.drain_s)


async def give_team(compute: ComputeThread, num_threads: int) -> None:
    """Let the compute thread have all threads for tensor arithmetic (0: as many as torch would
    take), and every other thread of the process none but itself.

    OpenMP keeps a team for each thread that has ever computed with others. As soon as all of them
    together have more threads than there are cores, GNU's library lets none wait for its next work
    but sends them to sleep, a hundred times in each decode step.
    """
    num_threads = num_threads or torch.get_num_threads()

    def take() -> None:
        torch.get_num_threads()  # the first look gives a thread the others' number
        torch.set_num_threads(num_threads)

    await compute(take)
    torch.set_num_threads(1)  # here, and in threads that have not computed yet


def core_turns(settings: WorkerSettings, device: str) -> CoreTurns:
    """Those of a worker: as many steps at a time as the cores have threads for."""
    if device != "cpu" or not settings.core_lock:
        return CoreTurns()
    num_threads = settings.compute.threads or torch.get_num_threads()
    has_affinity = hasattr(os, "sched_getaffinity")
    num_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return CoreTurns(Path(settings.core_lock), max(1, num_cores // num_threads))


def open_model(settings: WorkerSettings) -> ModelFolder:
    """Find and check the model. Blocks; raises `TriptychError`."""
    directory = find_model_dir(settings.model.path)
    spec = ModelSpec.load(directory)
    device = settings.compute.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = spec.dtype if settings.model.dtype == "auto" else settings.model.dtype
    kernels = KernelChoice(settings.compute.linear_kernel, settings.compute.quantization)
    return ModelFolder(
        directory,
        spec,
        dtype,
        device,
        kernels,
        deterministic=settings.compute.deterministic,
    )


@asynccontextmanager
async def open_worker(
    me: WorkerRef,
    stages: tuple[Role, ...],
    settings: WorkerSettings,
    bus: Bus,
    transport: Transport,
    cores: CoreTurns,
) -> AsyncIterator[Worker]:
    """The links of one worker; gateways' cancel requests and heartbeats are followed within."""
    cancellations = Cancellations()
    registry = CollectorRegistry()
    registry.register(TransportCollector(transport.counters))

    async def on_cancel(message: CancelRequest, headers: Headers) -> None:
        cancellations.cancel(message.request_id, message.attempt)
        transport.drop(message.request_id)

    async def on_alive(message: RequestsAlive, headers: Headers) -> None:
        transport.extend(message.request_ids)

    subscriptions = [
        await bus.subscribe(subjects.CANCEL, CancelRequest, on_cancel),
        await bus.subscribe(subjects.ALIVE, RequestsAlive, on_alive),
    ]
    with ComputeThread() as compute:
        try:
            yield Worker(
                me=me,
                stages=stages,
                model=settings.model.name,
                bus=bus,
                transport=transport,
                events=EventSink(bus, me),
                cancellations=cancellations,
                compute=compute,
                registry=registry,
                metrics=TaskMetrics.create(registry),
                drain_s=settings.drain_s,
                heartbeat_s=settings.bus.ack_wait_s / 3,
                cores=cores,
            )
        finally:
            for subscription in subscriptions:
                await subscription.close()


def weights_progress() -> Callable[[int, int], None]:
    """A call-back for the loader that logs `weights_loading`, at most a hundred times."""
    last_percent = -1

    def on_progress(bytes_done: int, bytes_total: int) -> None:
        nonlocal last_percent
        percent = 100 * bytes_done // max(1, bytes_total)
        if percent != last_percent:
            last_percent = percent
            logs.log_event(
                logger, logs.WEIGHTS_LOADING, bytes_done=bytes_done, bytes_total=bytes_total
            )

    return on_progress


def _transport(me: WorkerRef, compatibility: str, settings: WorkerSettings) -> UcxTransport:
    return UcxTransport(me, compatibility, lease_s=settings.transfer.lease_s)


def _registration(
    me: WorkerRef, stages: tuple[Role, ...], settings: WorkerSettings, compatibility: str
) -> Registration:
    return Registration(
        worker=me,
        stages=stages,
        model=settings.model.name,
        compatibility=compatibility,
        host=socket.gethostname(),
        pid=os.getpid(),
        ready=False,
    )
