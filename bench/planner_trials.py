"""Trials of the running system for `planner_accuracy`: single requests, and a few seconds of load.

In: a running system, or a simulated one. Out: what it took, in values that both have. No request of
a trial is part of a comparison. Pure but for `Trials`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from bench.planner_load import SPANS_WAIT_S, CpuSeconds, OwnCpu, Served, send, with_spans
from bench.planner_requests import KINDS, Request, RequestMaker
from bench.planner_speed import Pace, SpeedProbe
from services.planner.goodput import percentile
from services.planner.request import SimRequest
from services.planner.workload import Arrival
from shared.telemetry import names

APART_S = 10.0
"""Between single requests, in the simulation: each is alone."""
LOAD_SHARES = (0.65, 1.1)
"""Rates of loads, over what the CPU seconds of single requests would allow: they share steps."""
TOLD = {
    "text": (names.INGEST, names.DISPATCH, names.QUEUE_PREFILL, names.PREFILL),
    "image": (
        names.INGEST,
        names.DISPATCH,
        names.QUEUE_PREFILL,
        names.MEDIA_FETCH,
        names.PREPROCESS,
        names.ENCODE,
        names.TRANSFER_EMBEDDING,
        names.PREFILL,
        names.TRANSFER_KV,
    ),
}
"""Spans that a single request is judged by; a text's KV travels while it is computed."""
RANKS = (0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class Trial:
    """Requests, served one after the other (`single KIND`) or as they came (`load RATE`).

    `cpu` is beyond what the system takes without requests, `paces` what the machine was meanwhile.
    """

    name: str
    arrivals: Sequence[Arrival]
    served: Sequence[Served]
    cpu: CpuSeconds
    paces: Sequence[Pace]

    @property
    def is_single(self) -> bool:
        """Whether each request was alone."""
        return self.name.startswith("single")


@dataclass(frozen=True)
class Trials:
    """Those that a running system is asked for, again and again.

    A load takes `load_s`. `idle` is the CPU that the system takes in a second without requests.
    """

    url: str
    maker: RequestMaker
    num_singles: int
    load_s: float
    idle: CpuSeconds
    probe: SpeedProbe
    load_rates: tuple[float, ...] = ()

    def singles(self) -> list[Trial]:
        """Of each kind."""
        return [
            self._trial(
                f"single {kind.kind}",
                [self.maker.make(kind, n * APART_S) for n in range(self.num_singles)],
            )
            for kind in KINDS
        ]

    def all(self) -> list[Trial]:
        """Singles, and loads at each rate, other requests every time."""
        loads = [self.load(f"load {rate:.2f}", rate) for rate in self.load_rates]
        return [*self.singles(), *loads]

    def load(self, name: str, rate_per_s: float) -> Trial:
        """One load."""
        return self._trial(name, self.maker.load(num_requests(rate_per_s, self.load_s), rate_per_s))

    def _trial(self, name: str, requests: Sequence[Request]) -> Trial:
        cpu, started_s = OwnCpu(), time.perf_counter()
        if name.startswith("single"):
            served = [send(self.url, [each.at(0.0)])[0] for each in requests]
        else:
            served = send(self.url, requests)
        paces = self.probe.paces(started_s, time.perf_counter())
        failed = sum(not each.trace_id for each in served)
        if failed:
            raise RuntimeError(f"{name}: {failed} of {len(served)} requests failed")
        time.sleep(SPANS_WAIT_S)
        used = cpu.seconds().plus(self.idle, started_s - time.perf_counter())
        arrivals = [each.arrival for each in requests]
        return Trial(name, arrivals, with_spans(self.url, served), used, paces)


def num_requests(rate_per_s: float, load_s: float) -> int:
    """Of a load that takes so long."""
    return max(2, round(rate_per_s * load_s))


def load_rates(singles: Sequence[Trial], num_cores: int) -> tuple[float, ...]:
    """Rates of loads for as many cores."""
    cpu_s = sum(each.cpu.total_s / len(each.served) for each in singles) / len(singles)
    return tuple(share * num_cores / cpu_s for share in LOAD_SHARES)


def served_of(request: SimRequest) -> Served:
    """A simulated request as a client would have seen it."""
    ttft_s, tpot_s, ended_s = request.ttft_s, request.tpot_s, request.ended_s
    if ttft_s is None or tpot_s is None or ended_s is None:
        return Served()
    latency_s = ended_s - request.arrival.arrival_s
    return Served(ttft_s, latency_s, tpot_s, spans_s=request.spans_s)


def values(trials: Sequence[Trial]) -> dict[str, float]:
    """What trials of one name are judged by, all together, in seconds.

    Singles by their spans and not by their CPU time: who waits on an idle core may spin.
    """
    pairs = [pair for each in trials for pair in zip(each.arrivals, each.served, strict=True)]
    found = {}
    if not trials[0].is_single:
        found["cpu"] = sum(each.cpu.total_s for each in trials) / len(pairs)
        found["cpu gateway"] = sum(each.cpu.gateway_s for each in trials) / len(pairs)
    for kind in sorted({arrival.kind for arrival, _ in pairs}):
        served = [each for arrival, each in pairs if arrival.kind == kind]
        for rank in (0.5,) if trials[0].is_single else RANKS:
            name = f"{kind} p{100 * rank:.0f}"
            found[f"{name} TTFT"] = percentile([each.ttft_s for each in served], rank)
            found[f"{name} TPOT"] = percentile([each.tpot_s for each in served], rank)
        for span in TOLD[kind] if trials[0].is_single else ():
            found[span] = percentile([each.spans_s.get(span, 0.0) for each in served], 0.5)
    return found
