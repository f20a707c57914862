"""What a child process says on its pipe: JSON log lines, or plain text from libraries.

In: one line of bytes. Out: a `LogLine`. A line that is not JSON is kept as text, never dropped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

NO_EVENT = "log"
LEVELS = ("debug", "info", "warning", "error", "critical")


@dataclass(frozen=True, slots=True)
class LogLine:
    """One record: `level` is one of LEVELS, `event` its message, `fields` the rest."""

    level: str
    event: str
    fields: Mapping[str, Any] = field(default_factory=dict)

    def at_least(self, level: str) -> bool:
        return LEVELS.index(self.level) >= LEVELS.index(level)

    @property
    def weights_fraction(self) -> float | None:
        """How much of the weights is loaded, 0 to 1, where the line tells."""
        if self.event != "weights_loading":
            return None
        done, total = self.fields.get("bytes_done"), self.fields.get("bytes_total")
        if not isinstance(done, int) or not isinstance(total, int) or total <= 0:
            return None
        return min(1.0, done / total)

    @property
    def says_ready(self) -> bool:
        return self.event == "ready"

    def __str__(self) -> str:
        details = " ".join(f"{name}={value}" for name, value in self.fields.items())
        return f"{self.event} {details}".strip()


_NOISE = frozenset({"time", "logger", "instance"})
"""Fields that the launcher's own display already shows or that only a log store wants."""


def parse(line: bytes) -> LogLine:
    """Read one line; text counts as info, because nobody graded it."""
    text = line.decode("utf-8", errors="replace").rstrip()
    try:
        record = json.loads(text)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        return LogLine("info", text)
    level = str(record.pop("level", "info")).lower()
    event = str(record.pop("event", NO_EVENT))
    if event == NO_EVENT:  # a plain message of a library
        event = str(record.pop("message", ""))
    fields = {name: value for name, value in record.items() if name not in _NOISE}
    return LogLine(level if level in LEVELS else "info", event, fields)
