"""Whether the gateway lives, and whether it can answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from services.gateway.model import ServedModel
from services.gateway.problems import overloaded
from services.gateway.workers import Workers


@dataclass(frozen=True)
class Health:
    """Readiness: every stage of the model has a live and ready worker."""

    model: ServedModel
    workers: Workers
    retry_after_s: int

    def missing(self, *, pictures: bool) -> list[str]:
        """The stages that no worker fills, of those that a request needs."""
        return [
            role.value
            for role in self.model.roles(pictures=pictures)
            if not self.workers.is_served(role)
        ]

    def report(self) -> tuple[int, dict[str, Any]]:
        """Status and body of `/ready`."""
        missing = self.missing(pictures=True)
        body = {"ready": not missing, "model": self.model.name, "missing": missing}
        return (503 if missing else 200), body

    def require(self, *, pictures: bool) -> None:
        """Raises `Refused` (503) if a request would find nobody to work on it."""
        missing = self.missing(pictures=pictures)
        if missing:
            raise overloaded(
                f"no live worker for {' and '.join(missing)}; try again later", self.retry_after_s
            )
