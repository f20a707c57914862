"""What a child process says on its pipe: JSON log lines, nats-server's own, or plain text.

In: one line of bytes. Out: a `LogLine`. A line that is not JSON is kept as text, never dropped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

STAGES = frozenset({"encode", "prefill", "decode"})
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
        return self.event in ("ready", "Server is ready")  # ours, nats-server's

    @property
    def new_stages(self) -> tuple[str, ...]:
        """What a worker hosts from now on, where the line tells."""
        stages = self.fields.get("stages") if self.event == "role_changed" else None
        names = stages.split(",") if isinstance(stages, str) else []
        return tuple(names) if names and set(names) <= STAGES else ()

    def __str__(self) -> str:
        details = " ".join(f"{name}={value}" for name, value in self.fields.items())
        return f"{self.event} {details}".strip()


_NOISE = frozenset({"time", "logger", "instance"})
"""Fields that the launcher's own display already shows or that only a log store wants."""


_NATS = re.compile(r"\[\d+\] \S+ \S+ \[([A-Z]{3})\] +(.*)")
_NATS_LEVELS = {"DBG": "debug", "INF": "info", "WRN": "warning", "ERR": "error", "FTL": "critical"}


def parse(line: bytes) -> LogLine:
    """Read one line of whatever kind."""
    text = line.decode("utf-8", errors="replace").rstrip()
    try:
        record = json.loads(text)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        return _from_text(text)
    level = str(record.pop("level", "info")).lower()
    event = str(record.pop("event", record.pop("message", "")))
    fields = {name: value for name, value in record.items() if name not in _NOISE}
    return LogLine(level if level in LEVELS else "info", event, fields)


def _from_text(text: str) -> LogLine:
    """nats-server grades its lines; other text counts as info."""
    if match := _NATS.fullmatch(text):
        return LogLine(_NATS_LEVELS.get(match[1], "info"), match[2])
    return LogLine("info", text)
