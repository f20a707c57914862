"""The simulator's values that a profile does not hold, for `planner_accuracy`.

In: trials of the running system, with the pace of the machine at the time. Out: a cluster and a
performance model that give the same times: what HTTP, the bus and the client cost, and how much
slower steps are than a profile says. Pure.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from bench.planner_load import CpuSeconds
from bench.planner_speed import Pace
from bench.planner_trials import Trial, served_of, values
from services.planner.cluster import Cluster
from services.planner.engine import Slowness
from services.planner.perf_model import STEPS, PerformanceModel
from services.planner.simulator import simulate

FITTED = (
    "accept_s",
    "gateway_s",
    "dispatch_s",
    "queue_hop_s",
    "token_hop_s",
    "pull_s",
    "step_s",
    "row_s",
    "store_s",
    "event_s",
    "token_s",
    "request_s",
    "picture_s",
    "wait_share",
)
FIRST_S, FIRST_SHARE = 1e-3, 0.4
SMALLEST = 1e-5
LARGEST_SHARE = 0.95
CPU_WEIGHT = 8.0
"""What cores have to do decides how much load is too much."""
NUM_ROUNDS = 18
LEAST_GAIN = 0.01
SLOPE_STEP = 0.05
SLOWED = 0.5
"""Requests suffer less than bare arithmetic from a slow machine: with this power recordings differ
least from what is simulated."""
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Calibrated:
    """The values, for a machine on which a product takes `pace_s`."""

    cluster: Cluster
    model: PerformanceModel
    pace_s: float

    def slowness(self, paces: Sequence[Pace]) -> list[Slowness]:
        """How many times as long everything takes, and from when on."""
        return [(at_s, (seconds / self.pace_s) ** SLOWED) for at_s, seconds in paces]

    def simulated(self, sets: Sequence[Sequence[Trial]]) -> list[list[Trial]]:
        """The same trials, served by arithmetic."""
        return [[self._simulated(each) for each in trials] for trials in sets]

    def _simulated(self, trial: Trial) -> Trial:
        slowness = self.slowness(trial.paces)
        if trial.is_single and slowness:  # they are further apart here
            slowness = [(0.0, statistics.mean(each for _, each in slowness))]
        done = simulate(self.cluster, self.model, trial.arrivals, slowness)
        served = [served_of(each) for each in done.requests]
        return replace(trial, served=served, cpu=CpuSeconds(done.gateway_busy_s, done.host_busy_s))


def calibrated(
    cluster: Cluster, model: PerformanceModel, sets: Sequence[Sequence[Trial]]
) -> Calibrated:
    """Values with which all trials together take what they took."""
    fitting = _Fitting(cluster, model, sets)
    return fitting.made(fitting.improved(fitting.start()))


def by_name(sets: Sequence[Sequence[Trial]]) -> Iterator[tuple[str, dict[str, float]]]:
    """Values of all trials of each name."""
    for trials in zip(*sets, strict=True):
        yield trials[0].name, values(trials)


class _Fitting:
    """Levenberg and Marquardt's way, in logarithms, since all values are above 0."""

    def __init__(
        self, cluster: Cluster, model: PerformanceModel, sets: Sequence[Sequence[Trial]]
    ) -> None:
        self._cluster, self._model, self._sets = cluster, model, sets
        self._measured = dict(by_name(sets))
        paces = [seconds for trials in sets for each in trials for _, seconds in each.paces]
        self._pace_s = statistics.mean(paces) if paces else 1.0

    def start(self) -> Floats:
        links = [max(getattr(self._cluster.links, name), FIRST_S) for name in FITTED]
        links[FITTED.index("wait_share")] = FIRST_SHARE
        return np.log([*links, *(1.0 for _ in STEPS)])

    def made(self, guess: Floats) -> Calibrated:
        """What the logarithms stand for."""
        numbers = [float(each) for each in np.exp(guess)]
        links = replace(self._cluster.links, **dict(zip(FITTED, numbers, strict=False)))
        factors = dict(zip(STEPS, numbers[len(FITTED) :], strict=True))
        return Calibrated(
            replace(self._cluster, links=links),
            self._model.times(factors),
            self._pace_s,
        )

    def improved(self, guess: Floats) -> Floats:
        """Some rounds nearer to what was measured."""
        residuals, damping = self._residuals(guess), 0.1
        for _ in range(NUM_ROUNDS):
            slopes = self._slopes(guess, residuals)
            normal = slopes.T @ slopes + damping * np.eye(len(guess))
            step = np.linalg.solve(normal, -slopes.T @ residuals).clip(-1.0, 1.0)
            tried = (guess + step).clip(math.log(SMALLEST))
            share = FITTED.index("wait_share")
            tried[share] = min(tried[share], math.log(LARGEST_SHARE))
            found = self._residuals(tried)
            gain = 1.0 - (found @ found) / (residuals @ residuals)
            damping *= 0.3 if gain > 0 else 10.0
            if gain > 0:
                guess, residuals = tried, found
                if gain < LEAST_GAIN:
                    break
        return guess

    def _residuals(self, guess: Floats) -> Floats:
        """Logarithms of simulated over measured."""
        told = dict(by_name(self.made(guess).simulated(self._sets)))
        return np.array(
            [
                (CPU_WEIGHT if name.startswith("cpu") else 1.0)
                * math.log(max(told[trial][name], 1e-6) / max(value, 1e-6))
                for trial, measured in self._measured.items()
                for name, value in measured.items()
            ]
        )

    def _slopes(self, guess: Floats, residuals: Floats) -> Floats:
        """Of the residuals, `[residuals, values]`."""
        moves = SLOPE_STEP * np.eye(len(guess))
        columns = [(self._residuals(guess + move) - residuals) / SLOPE_STEP for move in moves]
        return np.stack(columns, axis=1)
