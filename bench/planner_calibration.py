"""Times of the running system that a profile does not hold, for `planner_accuracy`.

In: trials of the running system (single requests, and bursts of several at once), none of which is
part of a comparison. Out: a cluster and a performance model that give the same times: latencies,
the spans of steps, the time of a burst, and CPU seconds. What HTTP, the bus and the client cost is
fitted, how much slower steps are than alone, and how much cores hinder each other. Pure but for
`measure_trials`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from bench.planner_load import SPANS_WAIT_S, OwnCpu, Served, send, with_spans
from bench.planner_requests import KINDS, Request, RequestMaker
from services.planner.cluster import Cluster
from services.planner.perf_model import PerformanceModel
from services.planner.request import SimRequest
from services.planner.simulator import Simulated, simulate
from services.planner.workload import Arrival
from shared.telemetry import names

APART_S = 10.0
"""Between single requests, in the simulation: each is alone."""
BURST = 12
FITTED = ("gateway_s", "step_s", "store_s", "event_s", "token_s", "request_s", "picture_s")
SMALLEST_S = 1e-5
NUM_ROUNDS = 10
LEAST_GAIN = 0.01
SLOPE_STEP = 0.05
Floats = npt.NDArray[np.float64]
STEPS = {"encode": names.ENCODE, "preprocess": names.PREPROCESS, "prefill": names.PREFILL}
TOLD = (*STEPS.values(), names.INGEST, names.MEDIA_FETCH)
"""Spans that a single request is judged by."""


@dataclass(frozen=True)
class Trial:
    """Requests of one kind, served one after the other or all at once, and what that took."""

    name: str
    arrivals: Sequence[Arrival]
    served: Sequence[Served]
    cpu_s: float

    @property
    def is_burst(self) -> bool:
        """Whether all came at once."""
        return self.arrivals[-1].arrival_s == self.arrivals[0].arrival_s


def measure_trials(
    url: str, maker: RequestMaker, num_singles: int, num_bursts: int, idle_share: float
) -> Iterator[Trial]:
    """Singles and bursts of each kind, and bursts of both.

    `idle_share` is the CPU seconds that the system takes in each second without requests.
    """
    for kind in KINDS:
        requests = [maker.make(kind, n * APART_S) for n in range(num_singles)]
        yield _trial(url, f"single {kind.kind}", requests, idle_share)
    bursts = (*((kind.kind, (kind,)) for kind in KINDS), ("mixed", KINDS))
    for name, kinds in bursts * num_bursts:
        requests = [maker.make(kinds[n % len(kinds)], 0.0) for n in range(BURST)]
        yield _trial(url, f"burst {name}", requests, idle_share)


def _trial(url: str, name: str, requests: Sequence[Request], idle_share: float) -> Trial:
    cpu, started_s = OwnCpu(), time.perf_counter()
    if name.startswith("single"):
        served = [send(url, [each.at(0.0)])[0] for each in requests]
    else:
        served = send(url, requests)
    time.sleep(SPANS_WAIT_S)
    cpu_s = cpu.seconds() - idle_share * (time.perf_counter() - started_s)
    return Trial(name, [each.arrival for each in requests], with_spans(url, served), cpu_s)


def calibrated(
    cluster: Cluster, model: PerformanceModel, trials: Sequence[Trial]
) -> tuple[Cluster, PerformanceModel]:
    """Both as the running system is: Levenberg and Marquardt's way, in logarithms, since all
    values are above 0."""
    fitting = _Fitting(cluster, model, trials)
    values = fitting.start()
    residuals = fitting.residuals(values)
    damping = 0.1
    for _ in range(NUM_ROUNDS):
        slopes = fitting.slopes(values, residuals)
        normal = slopes.T @ slopes + damping * np.eye(len(values))
        step = np.linalg.solve(normal, -slopes.T @ residuals).clip(-1.0, 1.0)
        tried = (values + step).clip(math.log(SMALLEST_S))
        found = fitting.residuals(tried)
        is_better = found @ found < residuals @ residuals
        gain = 1.0 - (found @ found) / (residuals @ residuals)
        damping *= 0.3 if is_better else 10.0
        if is_better:
            values, residuals = tried, found
            if gain < LEAST_GAIN:
                break
    return fitting.made(values)


class _Fitting:
    """Values to fit, as logarithms, and how far they are off."""

    def __init__(self, cluster: Cluster, model: PerformanceModel, trials: Sequence[Trial]) -> None:
        self._cluster, self._model, self._trials = cluster, model, trials
        self._counts = Counter(trial.name for trial in trials)
        self._measured = [measured_values(trial) for trial in trials]
        self._steps = [name for name in STEPS if any(getattr(model, name).coefficients)]

    def start(self) -> Floats:
        links = [max(getattr(self._cluster.links, name), 1e-3) for name in FITTED]
        return np.log([*links, *(1.0 for _ in self._steps)])

    def made(self, values: Floats) -> tuple[Cluster, PerformanceModel]:
        """What the values stand for."""
        numbers = [float(each) for each in np.exp(values)]
        links = replace(self._cluster.links, **dict(zip(FITTED, numbers, strict=False)))
        changes = {}
        for name, factor in zip(self._steps, numbers[len(FITTED) :], strict=True):
            fit = getattr(self._model, name)
            scaled = tuple(factor * each for each in fit.coefficients)
            changes[name] = fit.model_copy(update={"coefficients": scaled})
        return replace(self._cluster, links=links), self._model.model_copy(update=changes)

    def residuals(self, values: Floats) -> Floats:
        """Logarithms of simulated over measured. Each kind of trial counts once, however many
        there are."""
        cluster, model = self.made(values)
        found = []
        done = simulated(cluster, model, self._trials)
        for trial, told_of, measured in zip(self._trials, done, self._measured, strict=True):
            told = simulated_values(trial, told_of)
            weight = self._counts[trial.name] ** -0.5
            found += [
                weight * math.log(max(told[name], 1e-6) / max(value, 1e-6))
                for name, value in measured.items()
            ]
        return np.array(found)

    def slopes(self, values: Floats, residuals: Floats) -> Floats:
        """Of the residuals, `[residuals, values]`."""
        columns = []
        for number in range(len(values)):
            moved = values.copy()
            moved[number] += SLOPE_STEP
            columns.append((self.residuals(moved) - residuals) / SLOPE_STEP)
        return np.stack(columns, axis=1)


def simulated(
    cluster: Cluster, model: PerformanceModel, trials: Sequence[Trial]
) -> list[Simulated]:
    """Each trial's requests, served by arithmetic."""
    return [simulate(cluster, model, trial.arrivals) for trial in trials]


def measured_values(trial: Trial) -> dict[str, float]:
    """What a trial is judged by, in seconds."""
    return _values(trial, trial.served, trial.cpu_s)


def simulated_values(trial: Trial, done: Simulated) -> dict[str, float]:
    """The same of its simulation."""
    return _values(trial, [served_of(each) for each in done.requests], done.host_busy_s)


def served_of(request: SimRequest) -> Served:
    """A simulated request as a client would have seen it."""
    ttft_s, tpot_s, ended_s = request.ttft_s, request.tpot_s, request.ended_s
    if ttft_s is None or tpot_s is None or ended_s is None:
        return Served()
    latency_s = ended_s - request.arrival.arrival_s
    return Served(ttft_s, latency_s, tpot_s, spans_s=request.spans_s)


def _values(trial: Trial, served: Sequence[Served], cpu_s: float) -> dict[str, float]:
    found = {
        "ttft": statistics.median(each.ttft_s for each in served),
        "tpot": statistics.median(each.tpot_s for each in served),
        "cpu": cpu_s / len(served),
    }
    if trial.is_burst:
        return found | {"last": max(each.latency_s for each in served)}
    for span in TOLD:
        seconds = statistics.median(each.spans_s.get(span, 0.0) for each in served)
        if seconds:
            found[span] = seconds
    return found
