"""The simulator against the running system: the share of good requests at three rates.

Starts every service on the demo model. A profile says what steps take; trials (single requests, and
a few at once) say what HTTP, the bus and the client add, and give the limits: multiples of what
single requests take. The rates are those at which the simulator expects the shares in `TARGETS`. At
each of them the same requests at the same times are sent over HTTP and simulated, on as many cores
as there are. Every prompt and picture is new, so that no cache answers. The compute is real.

A machine's speed drifts, so trials are made before and after each rate, and a rate is simulated
with what those two say; no request of a comparison is part of any trial. Other load falsifies
results: each part waits for a quiet machine, and the share that others took meanwhile is printed.
For each rate a table tells where the time went, measured and simulated. Prints the largest
difference in points last. `--keep FILE` writes what was measured, `--replay FILE` judges it again
with the simulator as it is now, and serves nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from bench.planner_calibration import (
    Trial,
    calibrated,
    measure_trials,
    measured_values,
    served_of,
    simulated,
    simulated_values,
)
from bench.planner_cores import measure_full_speed
from bench.planner_load import SPANS_WAIT_S, OwnCpu, Served, send, with_spans
from bench.planner_recording import Rate, Recording
from bench.planner_requests import MODEL, RequestMaker
from bench.planner_stages import stage_table
from bench.processes import ForeignLoad
from bench.server import running_server
from services.launcher.cores import own_cores
from services.planner.cluster import Cluster, Limits, Links
from services.planner.goodput import at_rate, rate_of
from services.planner.perf_model import PerformanceModel
from services.planner.profiling.command import profile
from services.planner.profiling.settings import ProfileSettings
from services.planner.simulator import simulate
from services.planner.slo import Slo
from services.planner.workload import Arrival
from services.prefill.build import SHARED_PASS_TOKENS
from shared.demo import model_dir
from shared.errors import SettingsError
from shared.runtime.settings import ComputeSettings
from shared.runtime.topology import parse_topology

TARGETS = (0.97, 0.85, 0.5)
"""Shares of good requests that the simulator expects: few wait, the knee, too many come."""
TTFT_FACTOR, TPOT_FACTOR = 3.0, 2.5
"""Limits over what single requests take."""
KV_BYTES = 512 << 20
NUM_HALVINGS = 12
IDLE_S = 2.0


@dataclass(frozen=True)
class System:
    """What runs, and the trials that it is asked for."""

    url: str
    maker: RequestMaker
    num_singles: int
    num_bursts: int
    idle_share: float

    def trials(self) -> list[Trial]:
        """Of the system now."""
        return list(
            measure_trials(self.url, self.maker, self.num_singles, self.num_bursts, self.idle_share)
        )

    def served(self, num_requests: int, rate_per_s: float) -> Rate:
        """Requests at this rate, and trials after them."""
        load = self.maker.load(num_requests, rate_per_s)
        foreign = ForeignLoad()
        served = send(self.url, load)
        share = foreign.share()
        time.sleep(SPANS_WAIT_S)
        served = with_spans(self.url, served)
        return Rate(rate_per_s, [each.arrival for each in load], served, share, self.trials())


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m bench planner_accuracy", description=__doc__)
    parser.add_argument("--profile", type=Path, help="of the demo model with 1 thread (measured)")
    parser.add_argument("--topology", default="1E 1P 1D", help="workers (1E 1P 1D)")
    parser.add_argument("--requests", type=int, default=200, help="at each rate (200)")
    parser.add_argument("--singles", type=int, default=10, help="of each kind, in a trial (10)")
    parser.add_argument("--bursts", type=int, default=3, help="of each kind, in a trial (3)")
    parser.add_argument("--seed", type=int, default=0, help="of the requests (0)")
    parser.add_argument("--max-foreign", type=float, default=0.1, help="others' CPU share (0.1)")
    parser.add_argument("--quiet-wait-s", type=float, default=30.0, help="patience for quiet (30)")
    parser.add_argument("--keep", type=Path, help="write what was measured to this file")
    parser.add_argument("--replay", type=Path, help="judge what such a file holds, serve nothing")
    options = parser.parse_args()
    if options.replay is None:
        recording = measure(options)
    else:
        try:
            recording = Recording.read(options.replay)
        except SettingsError as error:
            parser.error(str(error))
    if options.keep is not None:
        recording.write(options.keep)
    judge(recording)


def measure(options: argparse.Namespace) -> Recording:
    """Trials, a rate, trials, a rate, trials, a rate, trials."""
    quiet = partial(ForeignLoad().wait_until_quiet, options.max_foreign, options.quiet_wait_s)
    quiet()
    model = read_profile(options.profile)
    cores, num_workers = len(own_cores()), len(parse_topology(options.topology))
    # One thread each; where there are more of them than cores, `triptych up` has small passes.
    pass_tokens = SHARED_PASS_TOKENS if num_workers > cores else Limits().max_batch_tokens
    limits = Limits(
        num_blocks=KV_BYTES // (16 * model.kv_bytes_per_token), max_batch_tokens=pass_tokens
    )
    speed = measure_full_speed(cores)
    cluster = Cluster(options.topology, limits, model.links or Links(), cores, speed)
    os.environ["TRIPTYCH_KV_BYTES"] = str(KV_BYTES)
    arguments = ["--model", str(model_dir()), "--served-name", MODEL, "--threads", "1"]
    with running_server([*arguments, "--topology", options.topology]) as url:
        maker = RequestMaker(options.seed)
        list(measure_trials(url, maker, 3, 1, 0.0))  # warms up
        quiet()
        system = System(url, maker, options.singles, options.bursts, measure_idle())
        before = system.trials()
        slo = limits_of(before)
        fitted = calibrated(cluster, model, before)
        arrivals = [each.arrival for each in maker.load(options.requests, 1.0)]
        rates = []
        for target in TARGETS:
            rate_per_s = rate_for(*fitted, arrivals, slo, target)
            quiet()
            rates.append(system.served(options.requests, rate_per_s))
            print(f"{rate_per_s:.2f} requests per second are served", flush=True)
    return Recording(cluster, model, slo, before, rates)


def judge(recording: Recording) -> None:
    """Simulate each rate with what the trials around it say, and print the differences."""
    cluster, model, slo = recording.cluster, recording.model, recording.slo
    print_fit(*calibrated(cluster, model, recording.before), recording.before)
    print(f"limits: TTFT {slo.ttft_s * 1e3:.0f} ms, TPOT {slo.tpot_s * 1e3:.1f} ms")
    differences, before = [], recording.before
    for rate in recording.rates:
        fitted = calibrated(cluster, model, [*before, *rate.after])
        differences.append(compare(*fitted, rate, slo))
        before = rate.after
    print(f"largest difference of attainment: {max(differences):.1f} points")


def read_profile(path: Path | None) -> PerformanceModel:
    """From the file, or measured now."""
    if path is not None:
        return PerformanceModel.from_json(path.read_text(encoding="utf-8"), str(path))
    with tempfile.TemporaryDirectory() as folder:
        settings = ProfileSettings(
            out=Path(folder) / "profile.json", compute=ComputeSettings(threads=1)
        )
        return profile(settings, Console())


def measure_idle() -> float:
    """CPU seconds in each second without requests."""
    cpu = OwnCpu()
    time.sleep(IDLE_S)
    return cpu.seconds() / IDLE_S


def limits_of(trials: Sequence[Trial]) -> Slo:
    """Multiples of what single requests take: of a picture's first token, of a text's others."""
    ttft_s = max(measured_values(each)["ttft"] for each in trials if not each.is_burst)
    tpot_s = max(measured_values(each)["tpot"] for each in trials if not each.is_burst)
    return Slo(TTFT_FACTOR * ttft_s, TPOT_FACTOR * tpot_s)


def rate_for(
    cluster: Cluster,
    model: PerformanceModel,
    arrivals: Sequence[Arrival],
    slo: Slo,
    target: float,
) -> float:
    """The rate at which the simulator expects this share of good requests."""
    low, high = 0.1, 1000.0
    for _ in range(NUM_HALVINGS):
        middle = (low * high) ** 0.5
        loaded = at_rate(arrivals, middle / rate_of(arrivals))
        done = simulate(cluster, model, loaded).requests
        is_above = share_of([served_of(each) for each in done], slo) >= target
        low, high = (middle, high) if is_above else (low, middle)
    return low


def share_of(served: Sequence[Served], slo: Slo) -> float:
    """The share of good ones."""
    return statistics.mean(each.is_good(slo) for each in served)


def compare(cluster: Cluster, model: PerformanceModel, rate: Rate, slo: Slo) -> float:
    """Served beside simulated; the difference in points."""
    kinds = [each.kind for each in rate.arrivals]
    done = simulate(cluster, model, rate.arrivals).requests
    sides = (rate.served, [served_of(each) for each in done])
    attained = [100 * share_of(side, slo) for side in sides]
    by_kind = [
        f"{kind} {100 * share_of(one, slo):.1f} / {100 * share_of(other, slo):.1f}"
        for kind in sorted(set(kinds))
        for one, other in [[_of_kind(kind, kinds, side) for side in sides]]
    ]
    print(
        f"{rate.rate_per_s:6.2f}/s  attained: served {attained[0]:5.1f} %  "
        f"simulated {attained[1]:5.1f} %  ({', '.join(by_kind)})  "
        f"failed {sum(not each.trace_id for each in rate.served)}  "
        f"others' CPU {rate.foreign_share:.2f}\n{stage_table(kinds, *sides)}",
        flush=True,
    )
    return abs(attained[0] - attained[1])


def _of_kind(kind: str, kinds: Sequence[str], side: Sequence[Served]) -> list[Served]:
    return [each for each, name in zip(side, kinds, strict=True) if name == kind]


def print_fit(cluster: Cluster, model: PerformanceModel, trials: Sequence[Trial]) -> None:
    """The fitted times, and how well they describe the trials."""
    links = ", ".join(f"{name} {value:.3g}" for name, value in vars_of(cluster.links))
    print(f"links: {links}; full_speed {cluster.full_speed:.2f}")
    for trial, done in zip(trials, simulated(cluster, model, trials), strict=True):
        told = simulated_values(trial, done)
        pairs = (
            f"{name} {1e3 * value:.1f} / {1e3 * told[name]:.1f}"
            for name, value in measured_values(trial).items()
        )
        print(f"  {trial.name:14} ms measured / simulated: {', '.join(pairs)}")


def vars_of(links: Links) -> list[tuple[str, float]]:
    """Names and values."""
    return [(name, getattr(links, name)) for name in links.__dataclass_fields__]


if __name__ == "__main__":
    main()
