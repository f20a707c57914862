"""What `planner_accuracy` makes of a recording: served beside simulated, rate by rate.

In: a recording. Out: prints the fitted times, shares of good requests and a table of the stages,
and the largest difference last. Serves nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bench.planner_calibration import Calibrated, by_name, calibrated
from bench.planner_load import Served
from bench.planner_recording import Chunk, Recording
from bench.planner_speed import Pace
from bench.planner_stages import stage_table
from bench.planner_trials import Trial, served_of, values
from services.planner.simulator import simulate
from services.planner.slo import Slo
from services.planner.workload import Arrival

TTFT_FACTOR, TPOT_FACTOR = 3.0, 2.5
"""Limits over what single requests take."""
OTHER_FACTORS = ((4.0, 3.0), (5.0, 4.0), (8.0, 5.0))


def judge(recording: Recording) -> None:
    """Simulate each chunk with what the trials around it say, and print the differences."""
    fitted = calibrated(recording.cluster, recording.model, recording.trials)
    slo = recording.slo
    print_fit(fitted, recording.trials)
    print(
        f"limits: TTFT {slo.ttft_s * 1e3:.0f} ms ({TTFT_FACTOR:g} times that of a single request), "
        f"TPOT {slo.tpot_s * 1e3:.1f} ms ({TPOT_FACTOR:g} times)"
    )
    differences = [compare(fitted, chunks, slo) for chunks in zip(*recording.rounds, strict=True)]
    print(f"largest difference of attainment: {max(differences):.1f} points")


def limits_of(trials: Sequence[Trial]) -> Slo:
    """Multiples of what single requests take: of a picture's first token, of a text's others."""
    image, text = (
        values([each for each in trials if each.name == f"single {kind}"])
        for kind in ("image", "text")
    )
    return Slo(TTFT_FACTOR * image["image p50 TTFT"], TPOT_FACTOR * text["text p50 TPOT"])


def simulated_chunk(
    fitted: Calibrated, arrivals: Sequence[Arrival], paces: Sequence[Pace] = ()
) -> list[Served]:
    """What clients would see."""
    done = simulate(fitted.cluster, fitted.model, arrivals, fitted.slowness(paces))
    return [served_of(each) for each in done.requests]


def share_of(served: Sequence[Served], slo: Slo) -> float:
    """The share of good ones."""
    return statistics.mean(each.is_good(slo) for each in served)


def compare(fitted: Calibrated, chunks: Sequence[Chunk], slo: Slo) -> float:
    """Served beside simulated at one rate; the difference in points."""
    kinds = [each.kind for chunk in chunks for each in chunk.arrivals]
    served = [each for chunk in chunks for each in chunk.served]
    told = [
        each for chunk in chunks for each in simulated_chunk(fitted, chunk.arrivals, chunk.paces)
    ]
    sides = (served, told)
    attained = [100 * share_of(side, slo) for side in sides]
    print(
        f"{chunks[0].rate_per_s:6.2f}/s  {len(served)} requests, attained: "
        f"served {attained[0]:5.1f} %  simulated {attained[1]:5.1f} %  "
        f"({_by_kind(kinds, sides, slo)})  failed {sum(not each.trace_id for each in served)}  "
        f"others' CPU {max(chunk.foreign_share for chunk in chunks):.2f}\n"
        f"  with limits of {_by_limits(sides, slo)}\n"
        f"{stage_table(kinds, *sides)}",
        flush=True,
    )
    return abs(attained[0] - attained[1])


def _by_kind(kinds: Sequence[str], sides: Sequence[Sequence[Served]], slo: Slo) -> str:
    told = []
    for kind in sorted(set(kinds)):
        one, other = (
            [each for each, name in zip(side, kinds, strict=True) if name == kind] for side in sides
        )
        told.append(f"{kind} {_pair(one, other, slo)}")
    return ", ".join(told)


def _by_limits(sides: Sequence[Sequence[Served]], slo: Slo) -> str:
    one, other = sides
    told = []
    for ttft, tpot in OTHER_FACTORS:
        looser = Slo(slo.ttft_s * ttft / TTFT_FACTOR, slo.tpot_s * tpot / TPOT_FACTOR)
        told.append(f"{ttft:g} and {tpot:g} times: {_pair(one, other, looser)}")
    return ", ".join(told)


def _pair(one: Sequence[Served], other: Sequence[Served], slo: Slo) -> str:
    return f"{100 * share_of(one, slo):.1f} / {100 * share_of(other, slo):.1f}"


def print_fit(fitted: Calibrated, sets: Sequence[Sequence[Trial]]) -> None:
    """The fitted times, and how well they describe the trials."""
    links = fitted.cluster.links
    named = ", ".join(f"{name} {getattr(links, name):.3g}" for name in links.__dataclass_fields__)
    print(f"links: {named}; full_speed {fitted.cluster.full_speed:.2f}")
    paces = (
        statistics.mean(each for trial in trials for _, each in fitted.slowness(trial.paces))
        for trials in sets
    )
    print(f"slowness: {', '.join(f'{each:.2f}' for each in paces)}")
    told = dict(by_name(fitted.simulated(sets)))
    for trial, measured in by_name(sets):
        pairs = (
            f"{name} {1e3 * value:.1f} / {1e3 * told[trial][name]:.1f}"
            for name, value in measured.items()
        )
        print(f"  {trial:12} ms measured / simulated: {', '.join(pairs)}")
