"""One piece of a request's time, as the gateway's trace endpoint tells it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

ROOT_NAME = "request"
NS_PER_MS = 1e6


class Kind(Enum):
    """What the time was spent on: the whole, waiting, moving bytes, or computing."""

    WHOLE = "whole"
    QUEUE = "queue"
    TRANSFER = "transfer"
    COMPUTE = "compute"


@dataclass(frozen=True, slots=True)
class Span:
    """`who` is the process; times are wall-clock nanoseconds since 1970."""

    name: str
    who: str
    start_unix_ns: int
    end_unix_ns: int

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Span:
        """A span from the endpoint's JSON."""
        return cls(
            name=str(record["name"]),
            who=str(record.get("instance") or record.get("service") or ""),
            start_unix_ns=int(record["start_unix_ns"]),
            end_unix_ns=int(record["end_unix_ns"]),
        )

    @property
    def duration_ms(self) -> float:
        return (self.end_unix_ns - self.start_unix_ns) / NS_PER_MS

    @property
    def kind(self) -> Kind:
        """From the name's first word: `queue.prefill`, `media.fetch`; everything else computes."""
        if self.name == ROOT_NAME:
            return Kind.WHOLE
        first = self.name.replace("_", ".").partition(".")[0]
        if first in ("queue", "wait"):
            return Kind.QUEUE
        return Kind.TRANSFER if first in ("transfer", "media") else Kind.COMPUTE
