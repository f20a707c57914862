"""What the gateway asks about the workers of its model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from shared.messages.control import Registration, Role
from shared.messages.descriptor import WorkerRef


class Workers(Protocol):
    """The live workers, as far as registrations tell."""

    def is_served(self, role: Role) -> bool:
        """Whether a live and ready worker hosts this stage."""
        ...

    def live(self) -> list[Registration]:
        """Every registered worker, in order of their names."""
        ...

    async def until(self, ready: Callable[[], bool]) -> None:
        """Return when this is so; registrations are what it looks at."""
        ...

    def is_gone(self, worker: WorkerRef) -> bool:
        """Whether this life of the worker is over: it lapsed, or a newer life began."""
        ...
