"""How fast the machine is, second by second, while `planner_accuracy` serves.

In: nothing. Out: what a fixed piece of arithmetic costs in CPU time, ten times a second, by a
process of its own that takes some hundredths of a core. A virtual machine's cores are slower for
seconds at a time, when others compute beside them; CPU time shows that, and shows little of the
load that merely makes the process wait.
"""

from __future__ import annotations

import multiprocessing
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection

SIDE = 96
NUM_WARM, NUM_TIMED = 20, 40
"""Products: caches and clock come up to speed in the first ones."""
PAUSE_S = 0.1
BUCKET_S = 0.5
TIMEOUT_S, STOP_TIMEOUT_S = 60.0, 5.0
MAX_READ = 10_000

Pace = tuple[float, float]
"""From so many seconds on, a product takes so many seconds."""


class SpeedProbe:
    """What the process behind a pipe reads; `paces` looks back."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._read: list[Pace] = self._ask()

    def paces(self, from_s: float, until_s: float) -> list[Pace]:
        """Means of buckets between two times of `time.perf_counter`, from 0 on. Empties what was
        read before. Raises `RuntimeError` where nothing was."""
        self._read += self._ask()
        self._read = [each for each in self._read if each[0] >= from_s]
        found = bucketed([(at_s - from_s, s) for at_s, s in self._read if at_s <= until_s])
        if not found:
            raise RuntimeError(f"the speed was not read for {until_s - from_s:.1f} s")
        return found

    def _ask(self) -> list[Pace]:
        """What was read since the last time."""
        self._pipe.send(None)
        if not self._pipe.poll(TIMEOUT_S):
            raise RuntimeError(f"the speed was not read within {TIMEOUT_S:g} s")
        return list(self._pipe.recv())


@contextmanager
def speed_probe() -> Iterator[SpeedProbe]:
    """Reads the speed within the block. Raises `RuntimeError` if nothing comes."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs,), daemon=True)
    process.start()
    theirs.close()  # so that the end of the process is seen
    try:
        yield SpeedProbe(pipe)
    finally:
        process.terminate()
        process.join(STOP_TIMEOUT_S)


def bucketed(read: Sequence[Pace]) -> list[Pace]:
    """Means of what was read in each bucket; one without any is as the one before."""
    buckets: dict[int, list[float]] = {}
    for at_s, seconds in read:
        buckets.setdefault(int(at_s / BUCKET_S), []).append(seconds)
    return [(n * BUCKET_S, sum(each) / len(each)) for n, each in sorted(buckets.items())]


def _work(pipe: Connection) -> None:
    """In a process of its own, until it is ended."""
    import torch

    torch.set_num_threads(1)
    factor = torch.rand(SIDE, SIDE)
    read: deque[Pace] = deque(maxlen=MAX_READ)
    while True:
        for _ in range(NUM_WARM):
            factor @ factor
        before_s = time.thread_time()
        for _ in range(NUM_TIMED):
            factor @ factor
        took_s = (time.thread_time() - before_s) / NUM_TIMED
        read.append((time.perf_counter(), took_s))
        if pipe.poll(PAUSE_S):
            pipe.recv()
            pipe.send(list(read))
            read.clear()
