"""What a stage is given: its identity and its links to the rest of the system."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from prometheus_client import CollectorRegistry

from shared.bus.base import Bus
from shared.messages.control import Role
from shared.messages.descriptor import WorkerRef
from shared.runtime.cancellations import Cancellations
from shared.runtime.compute import ComputeThread
from shared.runtime.core_turns import CoreTurns
from shared.runtime.events import EventSink
from shared.runtime.lifecycle import Stop
from shared.telemetry.metrics import TaskMetrics
from shared.transport.base import Transport


class Stage(Protocol):
    """What a host runs: one stage, or several as one."""

    async def run(self, stop: Stop) -> None: ...


@dataclass(frozen=True)
class Worker:
    """One process with the stages that it hosts. `model` is the name under which it is served.

    A change of role makes another `Worker` with the same identity and links; `registry` and
    `metrics` are each role's own.
    """

    me: WorkerRef
    stages: tuple[Role, ...]
    model: str
    bus: Bus
    transport: Transport
    events: EventSink
    cancellations: Cancellations
    compute: ComputeThread
    registry: CollectorRegistry
    metrics: TaskMetrics
    drain_s: float
    heartbeat_s: float
    cores: CoreTurns
