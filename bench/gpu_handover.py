"""Hand-over from device memory to device memory of two processes, through the transport.

In: nothing but a CUDA device. Out: lines of a table. Where UCX cannot reach device memory the line
says why.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import torch

from shared.errors import TransferError
from shared.messages.codec import decode, encode
from shared.messages.descriptor import WorkerRef
from shared.messages.refs import TensorRef
from shared.transport.base import Buffer, Segment
from shared.transport.tensors import byte_view
from shared.transport.ucx import UcxTransport

MIB = 1 << 20
SIZES = (16 * MIB, 256 * MIB, 1024 * MIB)
NUM_PULLS = 10
PULL_TIMEOUT_S = 10.0
START_TIMEOUT_S = 60.0
COMPATIBILITY = "bench"


def handover_lines() -> Iterator[str]:
    """One line per size: the best of a few pulls, as gigabytes per second."""
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(target=_own, args=(theirs,))
    child.start()
    try:
        if not ours.poll(START_TIMEOUT_S):
            yield f"hand-over: the other process gave no sign within {START_TIMEOUT_S:.0f} s"
            return
        ref = decode(ours.recv_bytes(), TensorRef)
        for num_bytes, took_s in asyncio.run(_pull_all(ref)):
            name = f"hand-over, {num_bytes // MIB} MiB"
            yield f"{name:<34}{1e3 * took_s:>7.2f} ms{num_bytes / took_s / 1e9:>7.1f} GB/s"
    except (TransferError, OSError, EOFError) as error:
        yield f"hand-over: not measured, {error}"
    finally:
        ours.close()
        child.join(PULL_TIMEOUT_S)
        if child.is_alive():
            child.terminate()


async def _pull_all(ref: TensorRef) -> list[tuple[int, float]]:
    """Seconds of the quickest pull of each segment."""
    taken = []
    async with UcxTransport(WorkerRef(name="receiver", incarnation=1), COMPATIBILITY) as receiver:
        for index, num_bytes in enumerate(ref.segment_bytes):
            landing = byte_view(torch.empty(num_bytes, dtype=torch.uint8, device="cuda"))
            # The transport knows no streams: memory must be free of queued work before.
            torch.cuda.synchronize()
            samples_s = []
            for _ in range(NUM_PULLS):
                started_s = time.perf_counter()
                await receiver.pull(ref, index, landing, timeout_s=PULL_TIMEOUT_S)
                samples_s.append(time.perf_counter() - started_s)
            taken.append((num_bytes, min(samples_s)))
    return taken


def _own(pipe: Connection) -> None:
    """Child process: expose device memory until the parent hangs up."""

    async def serve() -> None:
        async with UcxTransport(WorkerRef(name="owner", incarnation=1), COMPATIBILITY) as owner:
            views = [byte_view(torch.ones(n, dtype=torch.uint8, device="cuda")) for n in SIZES]
            torch.cuda.synchronize()
            segments = [_segment(n, view) for n, view in zip(SIZES, views, strict=True)]
            ref = owner.expose("lease", segments, holders=["bench"], on_release=lambda: None)
            pipe.send_bytes(encode(ref))
            await asyncio.to_thread(_wait_for_hang_up, pipe)

    asyncio.run(serve())


def _segment(num_bytes: int, view: Buffer) -> Segment:
    return Segment(num_bytes, lambda: view, True)


def _wait_for_hang_up(pipe: Connection) -> None:
    try:
        pipe.recv_bytes()
    except EOFError:
        return
