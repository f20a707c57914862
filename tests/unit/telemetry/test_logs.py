"""Log lines for people and for machines."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from shared.telemetry import logs, tracing

logger = logging.getLogger("test.logs")


@pytest.fixture(autouse=True)
def _restore_root() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def lines_of(log_format: str, level: str = "info") -> io.StringIO:
    stream = io.StringIO()
    logs.setup_logging(level, log_format, "decode-0", stream=stream)
    return stream


def test_text_lines_name_event_and_fields() -> None:
    stream = lines_of("text")
    logs.log_event(logger, "task_taken", request_id="r1", queued_s=0.123456789, note='a "b"')
    line = stream.getvalue()
    assert (
        line[12:] == ' INFO decode-0 task_taken request_id=r1 queued_s=0.123457 note="a \\"b\\""\n'
    )


def test_json_lines_can_be_parsed() -> None:
    stream = lines_of("json")
    logs.log_event(logger, logs.WEIGHTS_LOADING, bytes_done=1, bytes_total=2)
    logger.warning("plain %s", "text")
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert (first["event"], first["bytes_done"], first["bytes_total"]) == ("weights_loading", 1, 2)
    assert (first["level"], first["instance"], first["logger"]) == ("info", "decode-0", "test.logs")
    assert (second["event"], second["level"]) == ("plain text", "warning")


async def test_json_lines_name_the_trace(finished: InMemorySpanExporter) -> None:
    stream = lines_of("json")
    with tracing.span("s"):
        logs.log_event(logger, "inside")
        trace_id = tracing.current_trace_id()
    assert json.loads(stream.getvalue())["trace_id"] == trace_id


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_exceptions_are_shown(log_format: str) -> None:
    stream = lines_of(log_format)
    try:
        raise ValueError("odd")
    except ValueError:
        logger.exception("failed")
    assert "ValueError: odd" in stream.getvalue()


def test_auto_means_json_off_a_terminal_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = lines_of("auto")
    logger.info("x")
    assert json.loads(stream.getvalue())["event"] == "x"
    monkeypatch.setenv(logs.FORMAT_VARIABLE, "text")
    stream = lines_of("auto")
    logger.info("x")
    assert stream.getvalue().endswith("INFO decode-0 x\n")


def test_levels_are_obeyed() -> None:
    stream = lines_of("text", level="warning")
    logs.log_event(logger, "quiet")
    logs.log_event(logger, "loud", level=logging.ERROR)
    assert stream.getvalue().endswith("ERROR decode-0 loud\n")
    assert "quiet" not in stream.getvalue()
