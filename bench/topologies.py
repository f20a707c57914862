"""Encode, prefill and decode apart, against encode with prefill and against all in one process.

Compute is a delay: what a model of 7.6 billion weights takes on one A100
(`bench/delayed/profiles.py`; a token of a bench stands for ten). Gateway, NATS, schedulers,
preprocessing and UCX are real.

Eight workers each; the separate stages are split as the workload needs it, as an operator would.
Where encode and prefill share a process, pictures are spread over all of them too, which the
published baseline did not do; `PD, whole` comes nearer to it: the pictures of a request are one
picture of as many patches. Every topology is offered the same Poisson arrivals at the same three
rates of each workload. Goodput of a class is the highest rate at which 90 % of its requests keep
their limits, read off between the measured rates. Prints where the separate stages win and where
they lose; the image-heavy TTFT against the others comes last.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.progress import track

from bench.delayed.cluster import delayed_cluster
from bench.delayed.load import Kind, Outcome, attainment, failures, poisson_times, send_all
from bench.delayed.profiles import photo_model
from bench.delayed.report import plot_bars, table
from bench.processes import ForeignLoad
from services.planner.goodput import ATTAINED
from services.planner.slo import Slo

IMAGES = Kind("images", 4, 8, 10, slo=Slo(2.6, 0.04))
"""Limits as published for four pictures."""
WIDE = replace(IMAGES, num_pictures=1, picture_width=IMAGES.num_pictures)
TEXT = Kind("text", 0, 160, 40, slo=Slo(1.5, 0.06))
SPLITS = {"image-heavy": "6E 1P 1D", "text-heavy": "1E 5P 2D", "mixed": "5E 2P 1D"}
OURS = "EPD"
OTHERS = {"PD": "7EP 1D", "PD, whole": "7EP 1D", "monolith": "8EPD"}
SIDES = (OURS, *OTHERS)


@dataclass(frozen=True, slots=True)
class Workload:
    """A mix of requests and the rates at which it is offered."""

    name: str
    kinds: tuple[Kind, ...]
    rates_per_s: tuple[float, ...]


WORKLOADS = (
    Workload("image-heavy", (IMAGES,), (1.0, 2.0, 3.0)),
    Workload("text-heavy", (TEXT,), (1.5, 3.0, 6.0)),
    Workload("mixed", (IMAGES, TEXT), (1.5, 3.0, 4.5)),
)

_seeds = itertools.count(100)  # pictures of a run are unlike those of any other


@dataclass(frozen=True, slots=True)
class Run:
    """What became of its requests, and the share of all CPUs that others used meanwhile."""

    outcomes: list[Outcome]
    foreign_load: float


Runs = dict[tuple[str, str, float], Run]
"""Topology, workload and rate -> run."""


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m bench topologies", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="of arrivals in each run (10)")
    parser.add_argument("--out", type=Path, help="write a plot into this PNG file")
    options = parser.parse_args()
    runs = measure(options.seconds)
    found = goodputs(runs)
    if options.out:
        classes = sorted({key[1:] for key in found})
        plot_bars(
            options.out,
            [f"{workload}: {kind}" for workload, kind in classes],
            {name: [found[name, *each] for each in classes] for name in SIDES},
            title="Goodput of eight workers by topology",
            y_label="requests per second",
        )
    print(report(runs, found))


def measure(seconds: float) -> Runs:
    """All runs, one cluster after the other."""
    runs: Runs = {}
    clusters: dict[str, list[tuple[str, Workload]]] = {}
    for load in WORKLOADS:
        for side in SIDES:
            topology = SPLITS[load.name] if side == OURS else OTHERS[side]
            clusters.setdefault(topology, []).append((side, load))
    for topology, plan in track(clusters.items(), "topologies"):
        with delayed_cluster(topology, photo_model()) as cluster:
            send_all(cluster.url, [(0.0, kind) for kind in (IMAGES, TEXT)], seed=1)
            for side, load in plan:
                for rate in load.rates_per_s:
                    runs[side, load.name, rate] = offer(cluster.url, side, load, rate, seconds)
    return runs


def offer(url: str, side: str, load: Workload, rate: float, seconds: float) -> Run:
    """One workload at one rate; the same arrivals for every side."""
    kinds = [WIDE if kind is IMAGES and side == "PD, whole" else kind for kind in load.kinds]
    num_requests = round(rate * seconds)
    times = poisson_times(kinds, rate_per_s=rate, num_requests=num_requests, seed=7)
    load_of_others = ForeignLoad()
    outcomes = send_all(url, times, seed=next(_seeds))
    return Run(outcomes, load_of_others.share())


def goodputs(runs: Runs) -> dict[tuple[str, str, str], float]:
    """Topology, workload and class -> requests of the workload per second."""
    found = {}
    for name in SIDES:
        for load in WORKLOADS:
            shares = [attainment(runs[name, load.name, rate].outcomes) for rate in load.rates_per_s]
            for kind in load.kinds:
                found[name, load.name, kind.name] = highest_rate(
                    load.rates_per_s, [each[kind.name] for each in shares]
                )
    return found


def highest_rate(rates_per_s: Sequence[float], shares: Sequence[float]) -> float:
    """Where the share of good requests falls below 90 %, on straight lines between the rates.

    Below the lowest rate all are good; the highest measured rate is the most that is claimed.
    """
    points = [(0.0, 1.0), *zip(rates_per_s, shares, strict=True)]
    for (low, good), (high, bad) in itertools.pairwise(points):
        if bad < ATTAINED:
            return low + (high - low) * (good - ATTAINED) / (good - bad)
    return points[-1][0]


def report(runs: Runs, found: Mapping[tuple[str, str, str], float]) -> str:
    """TTFTs, goodputs, wins and losses, the ratio last."""
    lost = sum(len(failures(run.outcomes)) for run in runs.values())
    num_requests = sum(len(run.outcomes) for run in runs.values())
    parts = [ttft_table(runs), goodput_table(found), *verdicts(found)]
    parts.append(f"{num_requests} requests, {lost} without a whole answer")
    parts.append(foreign_verdict(runs))
    parts.append(ttft_verdict(runs))
    return "\n".join(parts)


def foreign_verdict(runs: Runs) -> str:
    """How far the machine was ours: what others use makes every latency of that run longer."""
    most = {
        side: max(run.foreign_load for key, run in runs.items() if key[0] == side) for side in SIDES
    }
    shares = ", ".join(f"{side} {100 * share:.0f} %" for side, share in most.items())
    return f"CPU that others used during a run, at most: {shares}"


def ttft_table(runs: Runs) -> str:
    """Median TTFT at each rate."""
    rows = [
        (
            f"{load.name}, {rate:g}/s",
            *(_seconds(runs[name, load.name, rate].outcomes) for name in SIDES),
        )
        for load in WORKLOADS
        for rate in load.rates_per_s
    ]
    return table(("median TTFT, s (compute is a delay)", *SIDES), rows)


def goodput_table(found: Mapping[tuple[str, str, str], float]) -> str:
    """Goodput of each class."""
    classes = list(dict.fromkeys(key[1:] for key in found))
    rows = [
        (f"{load}: {kind}", *(f"{found[name, load, kind]:.2f}" for name in SIDES))
        for load, kind in classes
    ]
    return table(("goodput, requests/s", *SIDES), rows)


def verdicts(found: Mapping[tuple[str, str, str], float]) -> list[str]:
    """A line for each comparison of goodput."""
    lines = []
    for (name, load, kind), ours in found.items():
        if name != OURS:
            continue
        for other in OTHERS:
            theirs = found[other, load, kind]
            word = "wins" if ours > theirs else "LOSES" if ours < theirs else "equals"
            lines.append(
                f"EPD {word} against {other} on {load}, {kind}: {ours:.2f} to {theirs:.2f}"
            )
    return lines


def ttft_verdict(runs: Runs) -> str:
    """How much lower the median TTFT of image-heavy requests is, at each rate."""
    load = WORKLOADS[0]
    lines = []
    for other in OTHERS:
        lower = [
            1
            - _median(runs[OURS, load.name, rate].outcomes)
            / _median(runs[other, load.name, rate].outcomes)
            for rate in load.rates_per_s
        ]
        lines.append(f"{' / '.join(f'{100 * each:.0f} %' for each in lower)} against {other}")
    rates = " / ".join(f"{rate:g}" for rate in load.rates_per_s)
    return (
        f"image-heavy TTFT of separate stages is lower, at {rates} requests/s, by "
        f"{', by '.join(lines)} (published: up to 72 % against PD)"
    )


def _median(outcomes: Sequence[Outcome]) -> float:
    return statistics.median([each.ttft_s for each in outcomes if not each.error] or [float("nan")])


def _seconds(outcomes: Sequence[Outcome]) -> str:
    return f"{_median(outcomes):.2f}"


if __name__ == "__main__":
    main()
