"""Finished trace spans on their way to whoever watches."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from shared.messages.base import Message

AttributeValue = bool | int | float | str


class SpanRecord(Message):
    """One finished span. `parent_id` is None for the root of a trace."""

    trace_id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    span_id: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    parent_id: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")] | None
    name: str
    service: str
    instance: str
    start_unix_ns: Annotated[int, Field(ge=0)]
    end_unix_ns: Annotated[int, Field(ge=0)]
    failed: bool = False
    attributes: dict[str, AttributeValue] = Field(default_factory=dict)

    @property
    def duration_s(self) -> float:
        """From start to end."""
        return (self.end_unix_ns - self.start_unix_ns) / 1e9


class SpanBatch(Message):
    """Spans of one process; `num_dropped` counts those lost since its start."""

    spans: tuple[SpanRecord, ...]
    num_dropped: Annotated[int, Field(ge=0)] = 0
