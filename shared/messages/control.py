"""Who lives, which requests live, and what shall stop."""

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
