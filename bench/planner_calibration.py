"""The simulator's values that a profile does not hold, for `planner_accuracy`.

In: trials of the running system, some at a time. Out: a cluster and a performance model that give
the same times: what HTTP, the bus and the client cost, how much slower steps are than a profile
says, and the pace of the machine at each of those times, since it drifts. Pure.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from bench.planner_trials import Trial, served_of, values
from services.planner.cluster import Cluster
from services.planner.perf_model import STEPS, PerformanceModel
from services.planner.simulator import simulate

FITTED = (
    "accept_s",
    "gateway_s",
    "queue_hop_s",
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
NUM_TURNS = 3
NUM_ROUNDS = 6
LEAST_GAIN = 0.02
SLOPE_STEP = 0.05
PACE_GAIN = 0.6
"""Latencies change by more than the pace does."""
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Calibrated:
    """The values, and how many times as long everything took at each time of trials; 1 is the mean
    of all."""

    cluster: Cluster
    model: PerformanceModel
    paces: tuple[float, ...]

    def at(self, pace: float) -> tuple[Cluster, PerformanceModel]:
        """Where everything takes so many times as long."""
        links = self.cluster.links.times(pace)
        return replace(self.cluster, links=links), self.model.times(dict.fromkeys(STEPS, pace))

    def between(self, number: int) -> tuple[Cluster, PerformanceModel]:
        """After the trials of this number and before those that follow."""
        return self.at(math.sqrt(self.paces[number] * self.paces[number + 1]))

    def simulated(self, sets: Sequence[Sequence[Trial]]) -> list[list[Trial]]:
        """The same trials, served by arithmetic."""
        found = []
        for pace, trials in zip(self.paces, sets, strict=True):
            cluster, model = self.at(pace)
            found.append([simulated(cluster, model, each) for each in trials])
        return found


def calibrated(
    cluster: Cluster, model: PerformanceModel, sets: Sequence[Sequence[Trial]]
) -> Calibrated:
    """In turns: the values by all trials together, and the pace of each set by what is left."""
    fitting = _Fitting(cluster, model, sets)
    guess, paces = fitting.start(), _first_paces(sets)
    for _ in range(NUM_TURNS):
        guess = fitting.improved(guess, paces)
        if len(sets) == 1:
            break
        told = fitting.made(guess, paces).simulated(sets)
        shifts = [_level(real) - _level(mine) for real, mine in zip(sets, told, strict=True)]
        paces = _around_1(
            pace * math.exp(PACE_GAIN * shift) for pace, shift in zip(paces, shifts, strict=True)
        )
    return fitting.made(guess, paces)


def simulated(cluster: Cluster, model: PerformanceModel, trial: Trial) -> Trial:
    """The same requests, served by arithmetic."""
    done = simulate(cluster, model, trial.arrivals)
    served = [served_of(each) for each in done.requests]
    return replace(trial, served=served, cpu_s=done.host_busy_s)


def by_name(sets: Sequence[Sequence[Trial]]) -> Iterator[tuple[str, dict[str, float]]]:
    """Values of all trials of each name."""
    for trials in zip(*sets, strict=True):
        yield trials[0].name, values(trials)


def _level(trials: Sequence[Trial]) -> float:
    """The mean logarithm of median latencies."""
    return statistics.mean(
        math.log(statistics.median(latencies))
        for trial in trials
        for latencies in (
            [each.ttft_s for each in trial.served],
            [each.tpot_s for each in trial.served],
        )
    )


def _first_paces(sets: Sequence[Sequence[Trial]]) -> tuple[float, ...]:
    return _around_1(math.exp(_level(trials)) for trials in sets)


def _around_1(paces: Iterator[float]) -> tuple[float, ...]:
    found = list(paces)
    mean = statistics.geometric_mean(found)
    return tuple(each / mean for each in found)


class _Fitting:
    """Levenberg and Marquardt's way, in logarithms, since all values are above 0."""

    def __init__(
        self, cluster: Cluster, model: PerformanceModel, sets: Sequence[Sequence[Trial]]
    ) -> None:
        self._cluster, self._model, self._sets = cluster, model, sets
        self._measured = dict(by_name(sets))

    def start(self) -> Floats:
        links = [max(getattr(self._cluster.links, name), FIRST_S) for name in FITTED]
        links[FITTED.index("wait_share")] = FIRST_SHARE
        return np.log([*links, *(1.0 for _ in STEPS)])

    def made(self, guess: Floats, paces: tuple[float, ...]) -> Calibrated:
        """What the logarithms stand for."""
        numbers = [float(each) for each in np.exp(guess)]
        links = replace(self._cluster.links, **dict(zip(FITTED, numbers, strict=False)))
        factors = dict(zip(STEPS, numbers[len(FITTED) :], strict=True))
        return Calibrated(replace(self._cluster, links=links), self._model.times(factors), paces)

    def improved(self, guess: Floats, paces: tuple[float, ...]) -> Floats:
        """Some rounds nearer to what was measured."""
        residuals, damping = self._residuals(guess, paces), 0.1
        for _ in range(NUM_ROUNDS):
            slopes = self._slopes(guess, residuals, paces)
            normal = slopes.T @ slopes + damping * np.eye(len(guess))
            step = np.linalg.solve(normal, -slopes.T @ residuals).clip(-1.0, 1.0)
            tried = (guess + step).clip(math.log(SMALLEST))
            share = FITTED.index("wait_share")
            tried[share] = min(tried[share], math.log(LARGEST_SHARE))
            found = self._residuals(tried, paces)
            gain = 1.0 - (found @ found) / (residuals @ residuals)
            damping *= 0.3 if gain > 0 else 10.0
            if gain > 0:
                guess, residuals = tried, found
                if gain < LEAST_GAIN:
                    break
        return guess

    def _residuals(self, guess: Floats, paces: tuple[float, ...]) -> Floats:
        """Logarithms of simulated over measured."""
        told = dict(by_name(self.made(guess, paces).simulated(self._sets)))
        return np.array(
            [
                (CPU_WEIGHT if name == "cpu" else 1.0)
                * math.log(max(told[trial][name], 1e-6) / max(value, 1e-6))
                for trial, measured in self._measured.items()
                for name, value in measured.items()
            ]
        )

    def _slopes(self, guess: Floats, residuals: Floats, paces: tuple[float, ...]) -> Floats:
        """Of the residuals, `[residuals, values]`."""
        moves = SLOPE_STEP * np.eye(len(guess))
        columns = [
            (self._residuals(guess + move, paces) - residuals) / SLOPE_STEP for move in moves
        ]
        return np.stack(columns, axis=1)
