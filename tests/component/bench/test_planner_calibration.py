"""Fitted to trials of a system whose times are known, the simulator tells what that system does."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bench.planner_calibration import SLOWED, Calibrated, calibrated
from bench.planner_judgement import simulated_chunk
from bench.planner_load import CpuSeconds, Served
from bench.planner_recording import Chunk, Recording
from bench.planner_speed import PAUSE_S, bucketed, speed_probe
from bench.planner_stages import stage_table
from bench.planner_trials import APART_S, Trial, load_rates, values
from services.planner.cluster import Cluster, Links
from services.planner.fit import Fit
from services.planner.perf_model import PerformanceModel
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
        accept_s=0.002,
        gateway_s=0.006,
        step_s=0.0006,
        row_s=0.0002,
        wait_share=0.3,
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


SLOWER = dict.fromkeys(("encode", "preprocess", "prefill"), 1.2)
"""The system's steps, next to what the profile says."""
PACES = (0.8, 1.25)
RATES = (8.0, 13.0)
TRUE = Calibrated(TRUTH, MODEL.times(SLOWER), 1.0)


@pytest.fixture(scope="module")
def sets() -> list[list[Trial]]:
    """As the system whose times are known would have been measured, at three paces."""
    asked = [
        [
            *(
                Trial(
                    f"single {s.kind}",
                    [arrival(s, n * APART_S) for n in range(3)],
                    [],
                    CpuSeconds(),
                    [(0.0, pace)],
                )
                for s in SHAPES
            ),
            *(
                Trial(
                    f"load {rate}",
                    poisson(SHAPES, rate_per_s=rate, num_requests=25, seed=10 * number + place),
                    [],
                    CpuSeconds(),
                    [(0.0, pace)],
                )
                for place, rate in enumerate(RATES)
            ),
        ]
        for number, pace in enumerate(PACES)
    ]
    return TRUE.simulated(asked)


def test_a_fitted_simulator_foresees_another_load(sets: list[list[Trial]]) -> None:
    cluster = Cluster("1E 1P 1D", links=LINKS, num_cores=2, full_speed=0.8)
    fitted = calibrated(cluster, MODEL, sets)
    arrivals = poisson(SHAPES, rate_per_s=11.0, num_requests=150, seed=3)
    truth, told = (simulated_chunk(each, arrivals, [(0.0, 1.1)]) for each in (TRUE, fitted))
    for name in ("ttft_s", "tpot_s"):
        real, foreseen = (
            statistics.median(getattr(each, name) for each in side) for side in (truth, told)
        )
        assert foreseen == pytest.approx(real, rel=0.12)


def test_a_slower_machine_takes_longer_for_everything(sets: list[list[Trial]]) -> None:
    alone = sets[0][0]
    slow, quick = (
        values(TRUE.simulated([[replace(alone, paces=[(0.0, pace)])]])[0]) for pace in (2.0, 1.0)
    )
    ratio = slow["text p50 TTFT"] / quick["text p50 TTFT"]
    assert 0.95 * 2.0**SLOWED < ratio <= 2.0**SLOWED


def test_requests_meet_the_machine_as_it_is_at_their_time() -> None:
    arrivals = [arrival(SHAPES[0], at_s) for at_s in (0.0, 10.0)]
    (before, after) = simulated_chunk(TRUE, arrivals, [(0.0, 1.0), (9.5, 2.0)])
    assert after.tpot_s > 1.3 * before.tpot_s


def test_means_of_what_a_probe_read() -> None:
    read = [(0.1, 1.0), (0.4, 3.0), (1.2, 5.0)]
    assert bucketed(read) == [(0.0, 2.0), (1.0, 5.0)]


def test_a_probe_reads_the_speed() -> None:
    with speed_probe() as probe:
        started_s = time.perf_counter()
        time.sleep(3 * PAUSE_S)
        paces = probe.paces(started_s, time.perf_counter())
        assert all(0 < seconds < 1 for _, seconds in paces)
        with pytest.raises(RuntimeError, match="not read"):
            probe.paces(time.perf_counter() + 1.0, time.perf_counter() + 2.0)


def test_loads_are_relative_to_what_cores_can_do(sets: list[list[Trial]]) -> None:
    singles = [
        replace(each, cpu=CpuSeconds(0.0, 0.1 * len(each.served)))
        for each in sets[0]
        if each.is_single
    ]
    low, high = load_rates(singles, num_cores=2)
    assert (low, high) == pytest.approx((0.65 * 20, 1.1 * 20))


def test_a_table_shows_where_both_sides_differ(sets: list[list[Trial]]) -> None:
    served = list(sets[0][0].served)
    slower = [replace(each, ttft_s=2 * each.ttft_s) for each in served]
    lines = stage_table(["text"] * len(served), served, slower).splitlines()
    (row,) = (line for line in lines if "TTFT" in line)
    _, measured, _, simulated, *_ = row.split()
    assert float(simulated) == pytest.approx(2 * float(measured), abs=0.2)
    assert not any("media.fetch" in line for line in lines)


def test_what_was_measured_can_be_judged_again(sets: list[list[Trial]], tmp_path: Path) -> None:
    arrivals = poisson(SHAPES, rate_per_s=12.0, num_requests=5, seed=3)
    failed = [Served() for _ in arrivals]
    chunk = Chunk(12.0, arrivals, failed, [(0.0, 1.5)], 0.01)
    recording = Recording(TRUTH, MODEL, Slo(1.0, 0.1), sets, [[chunk], [chunk]])
    recording.write(tmp_path / "kept.json")
    again = Recording.read(tmp_path / "kept.json")
    assert (again.cluster, again.model, again.slo) == (TRUTH, MODEL, recording.slo)
    assert list(again.rounds[1][0].arrivals) == list(arrivals)
    assert list(again.rounds[1][0].served) == failed
    assert list(again.rounds[1][0].paces) == [(0.0, 1.5)]
    for kept, made in zip(again.trials, sets, strict=True):
        assert values([kept[0]]) == values([made[0]])
    with pytest.raises(SettingsError, match="--replay = .*cannot be read"):
        Recording.read(tmp_path / "none.json")
