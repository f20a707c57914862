"""Time on the device, between events of its own clock."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

NUM_WARM_UPS = 3


def median_s(run: Callable[[], object], rounds: int) -> float:
    """Median seconds of `rounds` runs, each waited for, after a few that are not counted."""
    for _ in range(NUM_WARM_UPS):
        run()
    samples_s = []
    for _ in range(rounds):
        start, stop = _event(), _event()
        torch.cuda.synchronize()
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        samples_s.append(float(start.elapsed_time(stop)) / 1e3)
    return statistics.median(samples_s)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
