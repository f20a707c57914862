"""How fast a pull between two processes of one host is, against a plain copy in one process.

    python -m bench.transfer [--seconds 20]

Prints latency and bandwidth per size, the raw memcpy of as many bytes, and their ratio. Also prints
the processor time that an idle transport takes.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np

from shared.messages.codec import decode, encode
from shared.messages.descriptor import WorkerRef
from shared.messages.refs import TensorRef
from shared.transport.base import Segment
from shared.transport.buffers import ByteArray
from shared.transport.ucx import UcxTransport

KIB, MIB = 1 << 10, 1 << 20
SIZES = (KIB, 10 * KIB, 100 * KIB, MIB, 8 * MIB, 64 * MIB)
COMPATIBILITY = "bench"
IDLE_S = 2.0


@dataclass(frozen=True)
class Timing:
    """Seconds per operation."""

    p50_s: float
    p99_s: float

    @staticmethod
    def of(samples_s: list[float]) -> Timing:
        """Summarise samples."""
        ordered = sorted(samples_s)
        return Timing(statistics.median(ordered), ordered[int(0.99 * (len(ordered) - 1))])


def _segment(value: ByteArray, is_instant: bool) -> Segment:
    return Segment(value.nbytes, lambda: value, is_instant)


def _own(pipe: Connection, is_instant: bool) -> None:
    """Child process: expose one segment per size until told to stop."""

    async def serve() -> None:
        async with UcxTransport(WorkerRef(name="owner", incarnation=1), COMPATIBILITY) as owner:
            values = [np.ones(size, np.uint8) for size in SIZES]
            segments = [_segment(value, is_instant) for value in values]
            ref = owner.expose("lease", segments, holders=["bench"], on_release=lambda: None)
            owner_task = asyncio.create_task(_keep_alive(owner))
            pipe.send(encode(ref))
            await asyncio.to_thread(pipe.recv)
            owner_task.cancel()

    asyncio.run(serve())


async def _keep_alive(owner: UcxTransport) -> None:
    while True:
        await asyncio.sleep(5)
        owner.extend(["bench"])


async def _time_pulls(
    transport: UcxTransport, ref: TensorRef, index: int, seconds: float
) -> Timing:
    landing = np.zeros(ref.segment_bytes[index], np.uint8)
    samples_s: list[float] = []
    until_s = time.perf_counter() + seconds
    while len(samples_s) < 10 or time.perf_counter() < until_s:
        started_s = time.perf_counter()
        await transport.pull(ref, index, landing, timeout_s=10)
        samples_s.append(time.perf_counter() - started_s)
    return Timing.of(samples_s[2:])


def _time_copies(num_bytes: int, seconds: float) -> Timing:
    source, target = np.ones(num_bytes, np.uint8), np.zeros(num_bytes, np.uint8)
    samples_s: list[float] = []
    until_s = time.perf_counter() + seconds
    while len(samples_s) < 10 or time.perf_counter() < until_s:
        started_s = time.perf_counter()
        np.copyto(target, source)
        samples_s.append(time.perf_counter() - started_s)
    return Timing.of(samples_s[2:])


async def _measure(is_instant: bool, seconds: float, show: Callable[[str], None]) -> None:
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=_own, args=(theirs, is_instant))
    child.start()
    ref = decode(await asyncio.to_thread(ours.recv), TensorRef)
    share_s = seconds / len(SIZES)
    show("     bytes   pull p50   pull p99       GB/s   memcpy p50   ratio")
    async with UcxTransport(WorkerRef(name="receiver", incarnation=1), COMPATIBILITY) as receiver:
        for index, size in enumerate(SIZES):
            pull = await _time_pulls(receiver, ref, index, share_s * 0.8)
            copy = _time_copies(size, share_s * 0.2)
            show(
                f"{size:>10} {pull.p50_s * 1e6:>7.0f} us {pull.p99_s * 1e6:>7.0f} us "
                f"{size / pull.p50_s / 1e9:>10.2f} {copy.p50_s * 1e6:>9.1f} us "
                f"{pull.p50_s / copy.p50_s:>7.1f}"
            )
        started_s = time.process_time()
        await asyncio.sleep(IDLE_S)
        idle = (time.process_time() - started_s) / IDLE_S
        show(f"an idle transport takes {100 * idle:.2f} % of a core")
    ours.send("stop")
    await asyncio.to_thread(child.join)


def main() -> None:
    """Measure segments that lie ready and segments that a thread opens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="of measuring, in all")
    seconds = parser.parse_args().seconds
    for is_instant in (True, False):
        print("segments lie ready" if is_instant else "segments are opened in a thread")
        asyncio.run(_measure(is_instant, seconds / 2, print))


if __name__ == "__main__":
    main()
