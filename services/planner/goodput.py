"""How a cluster does under a load, class by class, and how much load it can take.

In: a cluster, a performance model, arrivals, the latency that counts as good. Out: a forecast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from services.planner.cluster import Cluster
from services.planner.perf_model import PerformanceModel
from services.planner.request import SimRequest
from services.planner.simulator import simulate
from services.planner.slo import Slo
from services.planner.workload import Arrival

ATTAINED = 0.9
"""The share of every class that has to be good."""

MAX_STRETCH = 256.0
NUM_HALVINGS = 8


@dataclass(frozen=True, slots=True)
class ClassForecast:
    """One class of requests. Percentiles (50, 90, 99) are over those that were answered."""

    kind: str
    num_requests: int
    ttft_s: tuple[float, float, float]
    tpot_s: tuple[float, float, float]
    attainment: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """A cluster under one load; `peak_blocks` of KV for each worker that has any."""

    classes: tuple[ClassForecast, ...]
    peak_blocks: tuple[int, ...]

    @property
    def worst(self) -> float:
        """The share of good requests of the class that has the fewest."""
        return min(each.attainment for each in self.classes)

    @property
    def is_good(self) -> bool:
        """Whether enough of every class is good."""
        return self.worst >= ATTAINED


def forecast(
    cluster: Cluster, model: PerformanceModel, arrivals: Sequence[Arrival], slo: Slo
) -> Forecast:
    """Simulate, and sum up by class."""
    done = simulate(cluster, model, arrivals)
    kinds = sorted({each.kind for each in arrivals})
    by_kind = {
        kind: [each for each in done.requests if each.arrival.kind == kind] for kind in kinds
    }
    return Forecast(tuple(_summed(kind, by_kind[kind], slo) for kind in kinds), done.peak_blocks)


def rate_of(arrivals: Sequence[Arrival]) -> float:
    """Requests per second from the first arrival to the last; infinite if all come at once."""
    span_s = arrivals[-1].arrival_s - arrivals[0].arrival_s
    return (len(arrivals) - 1) / span_s if span_s > 0 else math.inf


def at_rate(arrivals: Sequence[Arrival], stretch: float) -> tuple[Arrival, ...]:
    """The same requests `stretch` times as fast."""
    return tuple(
        each.model_copy(update={"arrival_s": each.arrival_s / stretch}) for each in arrivals
    )


def goodput(
    cluster: Cluster, model: PerformanceModel, arrivals: Sequence[Arrival], slo: Slo
) -> float:
    """The highest rate (requests/s) at which enough of every class is good; 0 if there is none.

    By bisection between 1/256 and 256 times the trace's rate, to 0.3 %. More load is taken to be
    never better.
    """

    def is_good(stretch: float) -> bool:
        return forecast(cluster, model, at_rate(arrivals, stretch), slo).is_good

    low = 1.0
    if is_good(low):
        while low < MAX_STRETCH and is_good(low * 2):
            low *= 2
        if low >= MAX_STRETCH:
            return low * rate_of(arrivals)
    else:
        while low > 1 / MAX_STRETCH and not is_good(low / 2):
            low /= 2
        if low <= 1 / MAX_STRETCH:
            return 0.0
        low /= 2
    high = low * 2
    for _ in range(NUM_HALVINGS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if is_good(middle) else (low, middle)
    return low * rate_of(arrivals)


def attainments(
    cluster: Cluster,
    model: PerformanceModel,
    arrivals: Sequence[Arrival],
    slo: Slo,
    rates: Sequence[float],
) -> tuple[float, ...]:
    """The share of good requests of the worst class at each rate (requests/s)."""
    base = rate_of(arrivals)
    return tuple(
        forecast(cluster, model, at_rate(arrivals, rate / base), slo).worst for rate in rates
    )


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of them does not exceed; NaN of none."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)] if ranked else math.nan


def _summed(kind: str, requests: Sequence[SimRequest], slo: Slo) -> ClassForecast:
    answered = [each for each in requests if not each.is_refused]
    ttfts = [each.ttft_s for each in answered if each.ttft_s is not None]
    tpots = [each.tpot_s for each in answered if each.tpot_s is not None]
    num_good = sum(
        ttft <= slo.ttft_s and tpot <= slo.tpot_s for ttft, tpot in zip(ttfts, tpots, strict=True)
    )
    return ClassForecast(
        kind, len(requests), _ranks(ttfts), _ranks(tpots), num_good / len(requests)
    )


def _ranks(values: Sequence[float]) -> tuple[float, float, float]:
    return percentile(values, 0.5), percentile(values, 0.9), percentile(values, 0.99)
