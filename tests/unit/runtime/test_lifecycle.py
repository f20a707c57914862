"""Lifecycle: exit codes, signals and the tie to a parent, on real processes."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.errors import SettingsError, TriptychError
from shared.runtime.lifecycle import DIE_WITH_PARENT, Stop, report, run_service

SERVICE = """
import asyncio, sys
from shared.runtime.lifecycle import run_service

async def main(stop):
    print("up", flush=True)
    await stop.wait()
    print("draining", stop.reason, flush=True)
    await asyncio.sleep({drain_s})
    print("done", flush=True)

run_service(main)
"""


def start(drain_s: float, **environment: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVICE.format(drain_s=drain_s)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[3],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


def test_a_service_that_ends_by_itself_returns() -> None:
    async def main(stop: Stop) -> None:
        assert not stop.requested
        await asyncio.sleep(0)

    run_service(main)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (TriptychError("pool is empty"), 1, "error: pool is empty\n"),
        (SettingsError("--x = 1: too low"), 2, "error: --x = 1: too low\n"),
        (
            ExceptionGroup("tasks", [TriptychError("a"), SettingsError("b")]),
            1,
            "error: a\nerror: b\n",
        ),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    error: Exception, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async def main(stop: Stop) -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_service(main)
    assert caught.value.code == code
    assert capsys.readouterr().err == line


def test_a_defect_is_logged_with_its_stack_trace(caplog: pytest.LogCaptureFixture) -> None:
    assert report(ZeroDivisionError("division")) == 1
    (record,) = caplog.records
    assert record.getMessage() == "unexpected ZeroDivisionError: division"
    assert record.exc_info is not None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_drains(number: signal.Signals) -> None:
    with start(drain_s=0.05) as process:
        process.send_signal(number)
        out, _ = process.communicate(timeout=10)
    assert out == f"draining {number.name}\ndone\n"
    assert process.returncode == 0


def test_the_second_signal_ends_at_once() -> None:
    with start(drain_s=60) as process:
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        assert process.stdout.readline() == "draining SIGTERM\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 128 + signal.SIGTERM


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_a_service_drains_when_its_parent_is_killed() -> None:
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys, os, time\n"
            f"env = {{**os.environ, '{DIE_WITH_PARENT}': str(os.getpid())}}\n"
            f"subprocess.Popen([sys.executable, '-c', {SERVICE.format(drain_s=0.05)!r}], env=env)\n"
            "time.sleep(60)\n",
        ],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    with parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "up\n"
        parent.kill()
        # The pipe closes when the grandchild, its last writer, has ended.
        assert parent.stdout.read() == "draining SIGTERM\ndone\n"


def test_a_service_whose_parent_is_already_gone_does_not_start() -> None:
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", SERVICE.format(drain_s=0)],
        env={**os.environ, DIE_WITH_PARENT: "999999999"},
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[3],
    )
    assert result.returncode == 1
    assert "has already ended" in result.stderr
    assert time.monotonic() - started < 10
