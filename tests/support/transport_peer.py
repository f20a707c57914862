"""A worker in a process of its own that exposes and pulls as it is told, and can be killed.

The child speaks JSON lines: a command on stdin, its answer on stdout.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from shared.errors import TransferError
from shared.messages.codec import decode, encode
from shared.messages.descriptor import WorkerRef
from shared.messages.refs import TensorRef
from shared.transport.base import Segment
from shared.transport.ucx import UcxTransport

REPOSITORY = Path(__file__).parents[2]
COMPATIBILITY = "model-a:float32"


def filled(num_bytes: int, seed: int) -> np.ndarray:
    """Cheap bytes that show where they belong: a seed and a place."""
    period = np.arange(seed + 1, seed + 252) % 256
    return np.resize(period.astype(np.uint8), num_bytes)


class Peer:
    """The parent's handle of a child."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def ask(self, command: str, **arguments: Any) -> Any:
        """Send a command, wait for its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([command, arguments]).encode() + b"\n")
        line = await asyncio.wait_for(self.process.stdout.readline(), 15)
        assert line, f"the peer ended with {await self.process.wait()}"
        return json.loads(line)

    async def expose(self, lease_id: str, sizes: list[int], **arguments: Any) -> TensorRef:
        """Expose segments whose bytes are `filled(size, index)`."""
        answer = await self.ask("expose", lease_id=lease_id, sizes=sizes, **arguments)
        return decode(bytes.fromhex(answer), TensorRef)

    async def pull(self, ref: TensorRef, segment: int = 0, timeout_s: float = 5) -> str:
        """Returns "ok", "wrong bytes" or the outcome."""
        return await self.ask("pull", ref=encode(ref).hex(), segment=segment, timeout_s=timeout_s)

    async def kill(self) -> None:
        """As `kill -9` does it."""
        self.process.kill()
        await self.process.wait()

    def pause(self) -> None:
        """Stop the process where it stands; it is alive to everybody but does nothing."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self.process.send_signal(signal.SIGCONT)


@asynccontextmanager
async def transport_peer(
    name: str = "peer", incarnation: int = 1, lease_s: float = 30.0
) -> AsyncIterator[Peer]:
    """A child with an open transport."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.support.transport_peer"),
        *(name, str(incarnation), str(lease_s)),
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "UCX_WARN_UNUSED_ENV_VARS": "n"},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 20,
    )
    peer = Peer(process)
    try:
        assert await peer.ask("hello") == name
        yield peer
    finally:
        if process.returncode is None:
            peer.resume()
            assert process.stdin is not None
            process.stdin.close()
            try:
                await asyncio.wait_for(process.wait(), 8)
            except TimeoutError:
                await peer.kill()
                raise
        # Closes the pipes; asyncio warns of transports that are left to the collector.
        process._transport.close()


class _Child:
    def __init__(self, name: str, transport: UcxTransport) -> None:
        self._name = name
        self._transport = transport
        self._released: list[str] = []

    async def hello(self) -> str:
        return self._name

    async def expose(
        self, lease_id: str, sizes: list[int], holders: tuple[str, ...] = ("request",),
        open_s: float = 0.0,
    ) -> str:  # fmt: skip
        values = [filled(size, index) for index, size in enumerate(sizes)]

        def segment(value: np.ndarray) -> Segment:
            def open_slowly() -> np.ndarray:
                time.sleep(open_s)
                return value

            return Segment(value.nbytes, open_slowly, is_instant=not open_s)

        ref = self._transport.expose(
            lease_id,
            [segment(value) for value in values],
            holders=holders,
            on_release=lambda: self._released.append(lease_id),
        )
        return encode(ref).hex()

    async def pull(self, ref: str, segment: int, timeout_s: float) -> str:
        tensor = decode(bytes.fromhex(ref), TensorRef)
        landing = np.zeros(tensor.segment_bytes[segment], np.uint8)
        try:
            await self._transport.pull(tensor, segment, landing, timeout_s=timeout_s)
        except TransferError as error:
            return error.outcome.value
        is_right = np.array_equal(landing, filled(landing.nbytes, segment))
        return "ok" if is_right else "wrong bytes"

    async def revoke(self, lease_id: str) -> None:
        self._transport.revoke(lease_id)

    async def released(self) -> list[str]:
        return self._released

    async def counters(self) -> dict[str, int]:
        return asdict(self._transport.counters())


async def _main(name: str, incarnation: str, lease_s: str) -> None:
    me = WorkerRef(name=name, incarnation=int(incarnation))
    commands = asyncio.StreamReader(limit=1 << 20)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    async with UcxTransport(me, COMPATIBILITY, lease_s=float(lease_s)) as transport:
        child = _Child(name, transport)
        while line := await commands.readline():
            command, arguments = json.loads(line)
            answer = await getattr(child, command)(**arguments)
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
