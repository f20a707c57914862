"""Lines from children: JSON, text and rubbish."""

import io
import logging
from collections.abc import Iterator

import pytest

from services.launcher.log_line import LogLine, parse
from shared.telemetry.logs import WEIGHTS_LOADING, JsonFormatter, log_event


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        (b'{"level":"INFO","event":"ready","port":9}\n', LogLine("info", "ready", {"port": 9})),
        (b'{"level":"warning","message":"slow","time":"12:00"}\n', LogLine("warning", "slow")),
        (b"Segmentation fault\n", LogLine("info", "Segmentation fault")),
        (b"[7] 2026/01/02 03:04:05.678901 [WRN] Slow disk\n", LogLine("warning", "Slow disk")),
        (b"[1, 2]\n", LogLine("info", "[1, 2]")),
        (b'{"level":"loud","event":"x"}', LogLine("info", "x")),
        (b"\xff\n", LogLine("info", "\ufffd")),
    ],
)
def test_parse(raw: bytes, line: LogLine) -> None:
    assert parse(raw) == line


def test_levels_are_ordered() -> None:
    assert LogLine("error", "x").at_least("warning")
    assert not LogLine("info", "x").at_least("warning")


@pytest.mark.parametrize(
    ("fields", "fraction"),
    [
        ({"bytes_done": 25, "bytes_total": 100}, 0.25),
        ({"bytes_done": 101, "bytes_total": 100}, 1.0),
        ({"bytes_done": 1, "bytes_total": 0}, None),
        ({}, None),
    ],
)
def test_weights_progress(fields: dict[str, int], fraction: float | None) -> None:
    assert LogLine("info", "weights_loading", fields).weights_fraction == fraction


def test_other_events_tell_no_progress() -> None:
    line = LogLine("info", "copied", {"bytes_done": 1, "bytes_total": 2})
    assert line.weights_fraction is None


def test_a_line_reads_as_event_and_fields() -> None:
    assert str(LogLine("info", "took", {"ms": 3, "role": "decode"})) == "took ms=3 role=decode"


@pytest.fixture
def written() -> Iterator[tuple[logging.Logger, io.StringIO]]:
    """A logger that writes as the services do, and what it wrote."""
    logger, out = logging.getLogger("test_log_line"), io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(JsonFormatter("decode-0"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield logger, out
    logger.removeHandler(handler)


def test_what_the_services_log_is_understood(
    written: tuple[logging.Logger, io.StringIO],
) -> None:
    logger, out = written
    log_event(logger, WEIGHTS_LOADING, bytes_done=1, bytes_total=4)
    log_event(logger, "ready", role="decode")
    logger.error("out of %s", "memory")
    loading, ready, failed = map(parse, out.getvalue().encode().splitlines())
    assert loading.weights_fraction == 0.25
    assert ready.says_ready
    assert (failed.level, failed.event) == ("error", "out of memory")
