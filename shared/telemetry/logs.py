"""Structured log lines: one event name and its fields.

On a terminal a line reads `12:00:00.123 INFO decode-0 task_taken request_id=r1`; elsewhere, or with
TRIPTYCH_LOG_FORMAT=json, every line is one JSON object with at least time, level, logger, instance
and event, which a parent process can parse.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from datetime import UTC, datetime
from typing import TextIO

from shared.telemetry.tracing import current_trace_id

FORMAT_VARIABLE = "TRIPTYCH_LOG_FORMAT"
WEIGHTS_LOADING = "weights_loading"
"""Progress of reading weights; its fields are `bytes_done` and `bytes_total`."""
ROLE_CHANGED = "role_changed"
"""A worker hosts other stages now; its field `stages` names them, divided by commas."""

_FIELDS = "triptych_fields"
_PLAIN_VALUE = re.compile(r'[^\s="]+')


def setup_logging(
    level: int | str, log_format: str, instance: str, *, stream: TextIO | None = None
) -> None:
    """Send all of this process' log lines to `stream` (standard error), in place of what was set.

    `log_format` is "text", "json" or "auto": the environment's wish, else text on a terminal and
    JSON elsewhere.
    """
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    if log_format == "auto":
        log_format = os.environ.get(FORMAT_VARIABLE) or ("text" if stream.isatty() else "json")
    as_json = log_format.lower() == "json"
    handler.setFormatter(JsonFormatter(instance) if as_json else HumanFormatter(instance))
    level = level.upper() if isinstance(level, str) else level
    logging.basicConfig(level=level, handlers=[handler], force=True)


def log_event(
    logger: logging.Logger, event: str, *, level: int = logging.INFO, **fields: object
) -> None:
    """Log one event; values should be scalars."""
    if logger.isEnabledFor(level):
        logger.log(level, event, extra={_FIELDS: fields}, stacklevel=2)


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
            "event": record.getMessage(),
        }
        if trace_id := current_trace_id():
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
