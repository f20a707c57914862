"""Which cores each worker stays on.

In: the cores that the launcher may use, and how many threads each worker has. Out: a run of
neighbouring cores for each worker, so that two workers never wait for one core and a worker's
threads share its caches. Pure but for `own_cores`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

CPU_FOLDER = Path("/sys/devices/system/cpu")
ANYWHERE: tuple[int, ...] = ()


def own_cores(folder: Path = CPU_FOLDER) -> tuple[int, ...]:
    """The cores that this process may use, which in a container are fewer than there are; those of
    one socket and the halves of one core (hyperthreads) side by side."""
    if not hasattr(os, "sched_getaffinity"):
        return tuple(range(os.cpu_count() or 1))
    return tuple(
        sorted(os.sched_getaffinity(0), key=lambda number: (*_place(folder, number), number))
    )


def _place(folder: Path, number: int) -> tuple[int, int]:
    """Socket and core of a logical core; (0, number) where the system does not tell."""
    topology = folder / f"cpu{number}" / "topology"
    try:
        socket, core = (
            int((topology / name).read_text(encoding="ascii"))
            for name in ("physical_package_id", "core_id")
        )
    except (OSError, ValueError):
        return 0, number
    return socket, core


def divide(cores: Sequence[int], threads: int, num_workers: int) -> list[tuple[int, ...]]:
    """An equal run of `cores` for each worker, or `ANYWHERE` for all of them where there are fewer
    cores than threads: workers that must share do so best as the system sees fit."""
    share = len(cores) // max(1, num_workers)
    if share < threads:
        return [ANYWHERE] * num_workers
    return [tuple(cores[share * index : share * (index + 1)]) for index in range(num_workers)]
