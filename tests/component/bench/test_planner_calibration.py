"""Fitted to trials of a system whose times are known, the simulator tells what that system does."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from bench.planner_calibration import (
    APART_S,
    BURST,
    Trial,
    calibrated,
    measured_values,
    served_of,
)
from bench.planner_load import Served
from bench.planner_recording import Rate, Recording
from bench.planner_stages import stage_table
from services.planner.cluster import Cluster, Links
from services.planner.fit import Fit
from services.planner.perf_model import PerformanceModel
from services.planner.simulator import simulate
from services.planner.slo import Slo
from services.planner.workload import Arrival, Shape, poisson
from shared.errors import SettingsError

SHAPES = (Shape("text", 300, 24), Shape("image", 60, 12, (112,)))
MODEL = PerformanceModel(
    encode=Fit(coefficients=(0.002, 2e-5)),
    preprocess=Fit(coefficients=(0.001, 1e-5)),
    prefill=Fit(coefficients=(0.003, 6e-5, 0.0)),
    decode=Fit(coefficients=(0.0015, 1e-7, 1e-4)),
    kv_bytes_per_token=2048,
    embedding_bytes_per_patch=192,
    num_layers=4,
)
LINKS = Links(queue_hop_s=0.001, token_hop_s=0.0003)
TRUTH = Cluster(
    "1E 1P 1D",
    links=replace(
        LINKS,
        gateway_s=0.006,
        step_s=0.0006,
        store_s=0.004,
        event_s=0.0004,
        token_s=0.0005,
        request_s=0.008,
        picture_s=0.01,
    ),
    num_cores=2,
    full_speed=0.8,
)


def arrival(shape: Shape, at_s: float) -> Arrival:
    fields = {
        "arrival_s": at_s,
        "num_prompt_tokens": shape.num_prompt_tokens,
        "num_output_tokens": shape.num_output_tokens,
        "patches": shape.patches,
        "class": shape.kind,
    }
    return Arrival.model_validate(fields)


def trial(name: str, arrivals: list[Arrival]) -> Trial:
    """As the system whose times are known would have been measured; its steps take 1.2 times as
    long as the profile says."""
    done = simulate(TRUTH, slow(1.2), arrivals)
    return Trial(name, arrivals, [served_of(each) for each in done.requests], done.host_busy_s)


def slow(factor: float) -> PerformanceModel:
    changes = {
        name: Fit(coefficients=tuple(factor * each for each in fit.coefficients))
        for name in ("encode", "preprocess", "prefill")
        for fit in [getattr(MODEL, name)]
    }
    return MODEL.model_copy(update=changes)


@pytest.fixture(scope="module")
def trials() -> list[Trial]:
    text, image = SHAPES
    return [
        *(trial(f"single {s.kind}", [arrival(s, n * APART_S) for n in range(4)]) for s in SHAPES),
        *(trial(f"burst {s.kind}", [arrival(s, 0.0)] * BURST) for s in SHAPES),
        trial("burst mixed", [arrival((text, image)[n % 2], 0.0) for n in range(BURST)]),
    ]


def test_a_fitted_simulator_foresees_another_load(trials: list[Trial]) -> None:
    cluster, model = calibrated(
        Cluster("1E 1P 1D", links=LINKS, num_cores=2, full_speed=0.8), MODEL, trials
    )
    for name in ("encode", "prefill"):
        assert getattr(model, name).coefficients == pytest.approx(
            getattr(slow(1.2), name).coefficients, rel=0.15
        )
    arrivals = poisson(SHAPES, rate_per_s=12.0, num_requests=150, seed=3)
    truth = simulate(TRUTH, slow(1.2), arrivals).requests
    told = simulate(cluster, model, arrivals).requests
    for value in ("ttft_s", "tpot_s"):
        real, foreseen = (
            statistics.median(getattr(each, value) for each in side) for side in (truth, told)
        )
        assert foreseen == pytest.approx(real, rel=0.12)


def test_a_table_shows_where_both_sides_differ(trials: list[Trial]) -> None:
    served = list(trials[0].served)
    slower = [replace(each, ttft_s=2 * each.ttft_s) for each in served]
    lines = stage_table(["text"] * len(served), served, slower).splitlines()
    (row,) = (line for line in lines if "TTFT" in line)
    _, measured, _, simulated, *_ = row.split()
    assert float(simulated) == pytest.approx(2 * float(measured), abs=0.2)
    assert not any("media.fetch" in line for line in lines)


def test_what_was_measured_can_be_judged_again(trials: list[Trial], tmp_path: Path) -> None:
    arrivals = poisson(SHAPES, rate_per_s=12.0, num_requests=5, seed=3)
    failed = [Served() for _ in arrivals]
    rate = Rate(12.0, arrivals, failed, 0.01, trials)
    recording = Recording(TRUTH, MODEL, Slo(1.0, 0.1), trials, [rate])
    recording.write(tmp_path / "kept.json")
    again = Recording.read(tmp_path / "kept.json")
    assert (again.cluster, again.model, again.slo) == (TRUTH, MODEL, recording.slo)
    assert list(again.rates[0].arrivals) == list(arrivals)
    assert list(again.rates[0].served) == failed
    for kept, made in zip(again.before, trials, strict=True):
        assert measured_values(kept) == measured_values(made)
    with pytest.raises(SettingsError, match="--replay = .*cannot be read"):
        Recording.read(tmp_path / "none.json")
