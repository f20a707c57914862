"""`triptych up` as a child process, for benches that talk to it over HTTP."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from services.launcher.ports import free_port

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0


@contextmanager
def running_server(arguments: Sequence[str] = ()) -> Iterator[str]:
    """Start everything, yield the base URL once it is ready, stop everything."""
    port = free_port()
    command = [sys.executable, "-m", "services.cli", "up", "--port", str(port), *arguments]
    popen = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ
    )
    tail: deque[str] = deque(maxlen=50)
    ready = threading.Event()
    reader = threading.Thread(target=_follow, args=(popen, tail, ready), daemon=True)
    reader.start()
    try:
        while not ready.wait(0.2):
            if popen.poll() is not None:
                raise RuntimeError("triptych up ended:\n" + "".join(tail))
        yield f"http://127.0.0.1:{port}"
    finally:
        popen.send_signal(signal.SIGINT)
        try:
            popen.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            popen.kill()
        reader.join(5)


def _follow(popen: subprocess.Popen[str], tail: deque[str], ready: threading.Event) -> None:
    assert popen.stdout is not None
    for line in popen.stdout:
        tail.append(line)
        if line.startswith("ready "):
            ready.set()
