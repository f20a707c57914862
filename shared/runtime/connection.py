"""Who this process is, and its connection to the bus."""

from __future__ import annotations

import os
import re
import socket
import time

from shared.bus.limits import BusLimits
from shared.bus.nats_bus import NatsBus
from shared.messages.descriptor import WorkerRef
from shared.runtime.settings import BusSettings

_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")
_MAX_NAME_CHARS = 64


def new_identity(name: str, kind: str) -> WorkerRef:
    """A new life under `name`, or under one made of the kind of process, host and process id."""
    name = name or f"{kind}-{socket.gethostname()}-{os.getpid()}"
    return WorkerRef(
        name=_UNSAFE.sub("-", name)[-_MAX_NAME_CHARS:],
        # Later lives have larger numbers, also when the clock of another host started this one.
        incarnation=time.time_ns(),
    )


async def connect_bus(settings: BusSettings, me: WorkerRef) -> NatsBus:
    """Connect as this process. Raises `BusError` when the server stays away."""
    return await NatsBus.connect(
        settings.url,
        name=me.name,
        limits=BusLimits(
            connect_timeout_s=settings.connect_timeout_s, ack_wait_s=settings.ack_wait_s
        ),
        credentials_file=settings.credentials_file,
    )
