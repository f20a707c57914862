"""Workers of which only the registration exists."""

from __future__ import annotations

from shared.messages.control import Registration, Role
from shared.messages.descriptor import WorkerRef


def registered(
    worker: WorkerRef | str, *stages: Role, model: str = "m", ready: bool = True
) -> Registration:
    """What a worker says of itself; a name alone is its first incarnation."""
    return Registration(
        worker=WorkerRef(name=worker, incarnation=1) if isinstance(worker, str) else worker,
        stages=stages,
        model=model,
        compatibility="c",
        host="h",
        pid=1,
        ready=ready,
    )
