"""Servers as child processes of a bench, and how much of the machine others use meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 30.0


@contextmanager
def running(
    command: Sequence[str], environment: Mapping[str, str], url: str, log: Path
) -> Iterator[int]:
    """Start a server, yield its process id once it answers HTTP, stop it with all its children."""
    with log.open("wb") as output:
        popen = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    try:
        _wait_until_up(popen, url, log)
        yield popen.pid
    finally:
        _stop(popen)


def _wait_until_up(popen: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if popen.poll() is not None:
            raise RuntimeError(f"{popen.args!r}: ended with {popen.returncode}, see {log}")
        try:
            if httpx.get(f"{url}/v1/models", timeout=5.0).status_code < 500:
                return
        except httpx.HTTPError:
            pass
        time.sleep(1.0)
    raise RuntimeError(f"{popen.args!r}: no answer within {START_TIMEOUT_S:g} s, see {log}")


def _stop(popen: subprocess.Popen[bytes]) -> None:
    """Its own process group, which only this process knows."""
    for number, timeout_s in ((signal.SIGTERM, STOP_TIMEOUT_S), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(popen.pid, number)
            popen.wait(timeout_s)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
        else:
            return


class ForeignLoad:
    """The share of all CPUs that neither this process nor its children used since `mark`."""

    def __init__(self) -> None:
        self._me = psutil.Process()
        self.mark()

    def mark(self) -> None:
        """Count from now on."""
        self._start = self._read()

    def share(self) -> float:
        """0.0 for a machine of our own, 1.0 for all CPUs taken by others."""
        (then_s, busy_then, own_then), (now_s, busy, own) = self._start, self._read()
        capacity_s = (now_s - then_s) * (psutil.cpu_count() or 1)
        return max(0.0, (busy - busy_then) - (own - own_then)) / max(capacity_s, 1e-3)

    def wait_until_quiet(self, limit: float, timeout_s: float) -> bool:
        """Wait for two seconds of little foreign load; False if there were none in time."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            self.mark()
            time.sleep(2.0)
            if self.share() <= limit:
                return True
            if time.monotonic() > deadline_s:
                return False

    def _read(self) -> tuple[float, float, float]:
        times = psutil.cpu_times()
        busy = sum(times) - times.idle - times.iowait - times.guest - times.guest_nice
        own = 0.0
        for process in (self._me, *self._me.children(recursive=True)):
            try:
                used = process.cpu_times()
            except psutil.Error:
                continue
            own += used.user + used.system
        return time.perf_counter(), busy, own
