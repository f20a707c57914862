"""Who lives, in which role, which requests live, and what shall stop."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from shared.messages.base import Message
from shared.messages.descriptor import WorkerRef


class Role(StrEnum):
    """What an instance does."""

    GATEWAY = "gateway"
    ENCODE = "encode"
    PREFILL = "prefill"
    DECODE = "decode"


STAGES = (Role.ENCODE, Role.PREFILL, Role.DECODE)
"""What a worker may host, in the order of a request's life."""


class Registration(Message):
    """A worker's entry in the `workers` bucket; re-put as heartbeat, gone when its TTL lapses.

    A process registers once, with all the stages that it hosts.
    """

    worker: WorkerRef
    stages: Annotated[tuple[Role, ...], Field(min_length=1)]
    model: str
    compatibility: str
    host: str
    pid: int
    ready: bool
    capacity: dict[str, int] = Field(default_factory=dict)


class RoleRequest(Message):
    """Asks one life of a worker to host these stages from now on.

    Core messages may be lost, so it is sent again until the switch has ended: `switch_id` makes
    the copies one, and each is answered with the newest `RoleReport`.
    """

    switch_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    worker: WorkerRef
    stages: Annotated[tuple[Role, ...], Field(min_length=1, max_length=3)]


class RolePhase(StrEnum):
    """How far a role switch is; the last four end it."""

    DRAINING = "draining"
    BUILDING = "building"
    DONE = "done"
    REFUSED_BUSY = "refused_busy"
    REFUSED_PART = "refused_part"
    FAILED = "failed"

    @property
    def is_end(self) -> bool:
        return self not in (RolePhase.DRAINING, RolePhase.BUILDING)


class RoleReport(Message):
    """A worker on a switch that it was asked for.

    `stages` are what it hosted before and, once `DONE`, what it hosts now. `drain_s` and `build_s`
    are what these phases took, as far as they have ended.
    """

    switch_id: str
    worker: WorkerRef
    phase: RolePhase
    stages: tuple[Role, ...]
    drain_s: float = 0.0
    build_s: float = 0.0
    detail: str = ""


class CancelRequest(Message):
    """Broadcast by the gateway when a request ended, well or not, or an attempt was given up.

    Every attempt up to `attempt` is void: work on it stops at the next step, and what it still
    holds is released.
    """

    request_id: str
    attempt: Annotated[int, Field(ge=0)]


class RequestsAlive(Message):
    """A gateway's heartbeat: these requests are wanted, so leases held for them are extended."""

    gateway: WorkerRef
    request_ids: tuple[str, ...]
