"""Live role switches: mean latency when the load moves from pictures to long answers.

Compute is a delay: what a model of 7.6 billion weights takes on one A100
(`bench/delayed/profiles.py`), slowed down by `--slow` so that two cores keep up with 1,700 tokens
per second of it. Gateway, NATS, schedulers, preprocessing, UCX and the switches are real.

Eight workers begin as five encoders, one prefill, two decoders. A hundred requests with one picture
arrive at random: ten with answers of 50 tokens, then ninety of 500. On: with the first long one,
three encoders are asked to become decoders, one after the other. Off: all stay. Every answer must
be whole; the ratio of the mean latencies comes last.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.delayed.cluster import DelayedCluster, delayed_cluster
from bench.delayed.load import Kind, Outcome, Timetable, failures, poisson_times, send_all
from bench.delayed.profiles import photo_model, slowed
from bench.delayed.report import plot_bars, table
from shared.messages.control import Role
from shared.messages.descriptor import WorkerRef
from shared.runtime.connection import connect_bus
from shared.runtime.directory import WorkerDirectory
from shared.runtime.role_control import SwitchResult, request_switch
from shared.runtime.settings import BusSettings

TOPOLOGY = "5E 1P 2D"
MOVED = ("encoder-2", "encoder-3", "encoder-4")
SHORT, LONG = Kind("short", 1, 8, 50), Kind("long", 1, 8, 500)
RATE_PER_S = 3.0
REGISTRATION_TTL_S = 6.0
DIRECTORY_TIMEOUT_S = 30.0
SILENCE_S = 60.0
"""Patience with a worker that is asked: the machine may be busy with others."""


@dataclass(frozen=True)
class Side:
    """One run: what became of the requests, and the switches with the second they were done."""

    outcomes: Sequence[Outcome]
    switches: Sequence[tuple[float, SwitchResult]] = ()


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m bench role_switching", description=__doc__)
    parser.add_argument("--short", type=int, default=10, help="requests of 50 tokens (10)")
    parser.add_argument("--long", type=int, default=90, help="requests of 500 tokens (90)")
    parser.add_argument("--slow", type=float, default=2.0, help="factor on all times (2)")
    parser.add_argument("--out", type=Path, help="write a plot into this PNG file")
    options = parser.parse_args()
    times = timetable(options.short, options.long, RATE_PER_S / options.slow)
    sides = {name: run(times, options.slow, switches=name == "on") for name in ("off", "on")}
    if options.out:
        plot_bars(
            options.out,
            ["TTFT", "latency"],
            {
                name: [mean(side, lambda o: o.ttft_s), mean(side, lambda o: o.latency_s)]
                for name, side in sides.items()
            },
            title="Ten short answers, then ninety long ones, 5E 1P 2D",
            y_label=f"mean, s (all times {options.slow:g} times as long)",
        )
    print(report(sides, options.slow))
    if any(failures(side.outcomes) for side in sides.values()):
        raise SystemExit(1)


def timetable(num_short: int, num_long: int, rate_per_s: float) -> Timetable:
    """The short ones first, then the long ones, at one rate."""
    num_requests = num_short + num_long
    times = poisson_times([LONG], rate_per_s=rate_per_s, num_requests=num_requests, seed=11)
    return [
        (at_s, SHORT if index < num_short else kind) for index, (at_s, kind) in enumerate(times)
    ]


def run(times: Timetable, slow: float, *, switches: bool) -> Side:
    """All requests on a cluster of its own."""
    with delayed_cluster(TOPOLOGY, slowed(photo_model(), slow)) as cluster:
        send_all(cluster.url, [(0.0, Kind("warm-up", 1, 8, 5))], seed=1)
        if not switches:
            return Side(send_all(cluster.url, times, seed=2))
        first_long_s = next(at_s for at_s, kind in times if kind is LONG)
        mover = Mover(cluster, first_long_s)
        mover.start()
        outcomes = send_all(cluster.url, times, seed=2)
        mover.join()
        if mover.error is not None:
            raise mover.error
        return Side(outcomes, mover.done)


class Mover(threading.Thread):
    """Makes decoders of encoders at a given second, as an operator would."""

    def __init__(self, cluster: DelayedCluster, at_s: float) -> None:
        super().__init__(name="mover", daemon=True)
        self._cluster = cluster
        self._at_s = at_s
        self.done: list[tuple[float, SwitchResult]] = []
        self.error: Exception | None = None

    def run(self) -> None:
        """On its own thread, with its own event loop: the load must not wait for it."""
        try:
            asyncio.run(self._move())
        except Exception as error:
            self.error = error

    async def _move(self) -> None:
        started_s = time.perf_counter()
        me = WorkerRef(name="bench", incarnation=time.time_ns())
        bus_settings = BusSettings(url=self._cluster.nats_url)
        async with (
            await connect_bus(bus_settings, me) as bus,
            WorkerDirectory(bus, ttl_s=REGISTRATION_TTL_S) as directory,
        ):
            async with asyncio.timeout(DIRECTORY_TIMEOUT_S):
                await directory.wait_until_served([Role.ENCODE, Role.PREFILL, Role.DECODE])
            await asyncio.sleep(max(0.0, started_s + self._at_s - time.perf_counter()))
            for name in MOVED:
                result = await request_switch(
                    bus, directory, name, (Role.DECODE,), silence_s=SILENCE_S
                )
                self.done.append((time.perf_counter() - started_s, result))


def mean(side: Side, value: Callable[[Outcome], float]) -> float:
    """Over the whole answers."""
    return statistics.mean(value(each) for each in side.outcomes if not each.error)


def report(sides: dict[str, Side], slow: float) -> str:
    """A line for each side, the switches, the ratio last."""
    rows = [
        (
            name,
            f"{mean(side, lambda o: o.latency_s):.2f} s",
            f"{mean(side, lambda o: o.ttft_s):.2f} s",
            f"{1e3 * mean(side, lambda o: o.tpot_s):.0f} ms",
            f"{len(side.outcomes) - len(failures(side.outcomes))} of {len(side.outcomes)}",
        )
        for name, side in sides.items()
    ]
    head = (f"compute is a delay, times {slow:g}", "latency", "TTFT", "TPOT", "whole answers")
    lines = [table(head, rows)]
    lines += [
        f"{result.worker} became a decoder at {at_s:.1f} s: drain {result.drain_s:.2f} s, "
        f"build {result.build_s:.2f} s, in all {result.total_s:.2f} s"
        for at_s, result in sides["on"].switches
    ]
    lines += sorted({error for side in sides.values() for error in failures(side.outcomes)})
    off_s, on_s = (mean(sides[name], lambda o: o.latency_s) for name in ("off", "on"))
    lines.append(f"mean latency without switches over with: {off_s / on_s:.2f} (published: 2.2)")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
