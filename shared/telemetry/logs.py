"""Structured log lines: one event name and its fields.

On a terminal a line reads `12:00:00.123 INFO decode-0 task_taken request_id=r1`; with
TRIPTYCH_LOG_FORMAT=json every line is one JSON object. A parent process can parse the progress of
loading weights from either.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TextIO

from shared.telemetry.tracing import current_trace_id

FORMAT_VARIABLE = "TRIPTYCH_LOG_FORMAT"
WEIGHTS_LOADING = "weights_loading"

_EVENT = "triptych_event"
_FIELDS = "triptych_fields"
_HUMAN_PROGRESS = re.compile(rf"\b{WEIGHTS_LOADING} bytes_done=(\d+) bytes_total=(\d+)")
_PLAIN_VALUE = re.compile(r'[^\s="]+')


@dataclass(frozen=True)
class WeightsProgress:
    """How much of its weights a worker has read."""

    bytes_done: int
    bytes_total: int


def setup_logging(
    instance: str, *, level: int | str = logging.INFO, stream: TextIO | None = None
) -> None:
    """Send all of this process' log lines to `stream` (standard error), in place of what was set."""
    handler = logging.StreamHandler(stream or sys.stderr)
    as_json = os.environ.get(FORMAT_VARIABLE, "").lower() == "json"
    handler.setFormatter(JsonFormatter(instance) if as_json else HumanFormatter(instance))
    logging.basicConfig(level=level, handlers=[handler], force=True)


def log_event(
    logger: logging.Logger, event: str, *, level: int = logging.INFO, **fields: object
) -> None:
    """Log one event; values should be scalars."""
    if logger.isEnabledFor(level):
        logger.log(level, event, extra={_EVENT: event, _FIELDS: fields}, stacklevel=2)


def log_weights_loading(logger: logging.Logger, bytes_done: int, bytes_total: int) -> None:
    """The progress event that `parse_weights_progress` understands."""
    log_event(logger, WEIGHTS_LOADING, bytes_done=bytes_done, bytes_total=bytes_total)


def parse_weights_progress(line: str) -> WeightsProgress | None:
    """The progress that a log line of another process tells, whatever its format; None if none."""
    if WEIGHTS_LOADING not in line:
        return None
    if match := _HUMAN_PROGRESS.search(line):
        return WeightsProgress(int(match[1]), int(match[2]))
    try:
        fields = json.loads(line)
        if fields["event"] != WEIGHTS_LOADING:
            return None
        return WeightsProgress(int(fields["bytes_done"]), int(fields["bytes_total"]))
    except (ValueError, KeyError, TypeError):
        return None


class HumanFormatter(logging.Formatter):
    """For people."""

    def __init__(self, instance: str) -> None:
        super().__init__()
        self._instance = instance

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S.%f")[:-3]
        parts = [time, record.levelname, self._instance, record.getMessage()]
        parts += [f"{key}={_readable(value)}" for key, value in _fields(record).items()]
        line = " ".join(parts)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """For machines: one object a line."""

    def __init__(self, instance: str) -> None:
        super().__init__()
        self._instance = instance

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            **_fields(record),
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "instance": self._instance,
            "event": getattr(record, _EVENT, "log"),
        }
        if not hasattr(record, _EVENT):
            line["message"] = record.getMessage()
        if (trace_id := current_trace_id()) is not None:
            line["trace_id"] = trace_id
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    fields: dict[str, object] = getattr(record, _FIELDS, {})
    return fields


def _readable(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if _PLAIN_VALUE.fullmatch(text) else json.dumps(text)
