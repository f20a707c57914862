"""Goodput by bisection, and the search for the best plan."""

from __future__ import annotations

import pytest

from services.planner.cluster import Cluster, Limits, Links
from services.planner.fit import Fit
from services.planner.goodput import at_rate, forecast, goodput, percentile, rate_of
from services.planner.optimizer import Choice, cost_of, search, topologies
from services.planner.perf_model import PerformanceModel
from services.planner.slo import Slo
from services.planner.workload import Arrival
from shared.errors import SettingsError

MODEL = PerformanceModel(
    encode=Fit(coefficients=(0.0, 0.001)),
    prefill=Fit(coefficients=(0.0, 0.001, 0.0)),
    decode=Fit(coefficients=(0.01, 0.0, 0.0)),
    kv_bytes_per_token=1,
    embedding_bytes_per_patch=1,
)
FREE = Links(queue_hop_s=0.0, token_hop_s=0.0, pull_s=0.0, bytes_per_s=1e12)
ONE_BY_ONE = Limits(max_batch_tokens=100)


def regular(num_requests: int, every_s: float) -> list[Arrival]:
    fields = {"num_prompt_tokens": 100, "num_output_tokens": 1}
    return [
        Arrival.model_validate({"arrival_s": i * every_s, **fields}) for i in range(num_requests)
    ]


def test_goodput_of_a_regular_load_is_the_rate_of_the_slowest_stage() -> None:
    # 0.1 s for each prompt: up to 10/s none waits; beyond, the wait grows by request.
    arrivals = regular(400, 1.0)
    found = goodput(Cluster("1P 1D", ONE_BY_ONE, FREE), MODEL, arrivals, Slo(0.1001, 1.0))
    assert found == pytest.approx(10.0, rel=0.01)
    twice = goodput(Cluster("2P 1D", ONE_BY_ONE, FREE), MODEL, arrivals, Slo(0.1001, 1.0))
    assert twice == pytest.approx(20.0, rel=0.01)
    on_one_core = Cluster("2P 1D", ONE_BY_ONE, FREE, num_cores=1)
    shared = goodput(on_one_core, MODEL, arrivals, Slo(0.1001, 1.0))
    assert shared == pytest.approx(10.0, rel=0.01)


def test_what_no_rate_attains_has_no_goodput() -> None:
    cluster = Cluster("1P 1D", ONE_BY_ONE, FREE)
    assert goodput(cluster, MODEL, regular(20, 1.0), Slo(0.09, 1.0)) == 0.0


def test_every_class_has_to_attain() -> None:
    many = regular(99, 1.0)
    slow = Arrival.model_validate(
        {"arrival_s": 200, "num_prompt_tokens": 900, "num_output_tokens": 1, "class": "long"}
    )
    cluster = Cluster("1P 1D", ONE_BY_ONE, FREE)
    assert forecast(cluster, MODEL, many, Slo(0.2, 1.0)).is_good
    mixed = forecast(cluster, MODEL, [*many, slow], Slo(0.2, 1.0))
    assert [(each.kind, each.attainment) for each in mixed.classes] == [("all", 1.0), ("long", 0.0)]
    assert not mixed.is_good


def test_a_trace_is_stretched() -> None:
    assert rate_of(regular(11, 0.5)) == pytest.approx(2.0)
    assert rate_of(at_rate(regular(11, 0.5), 3.0)) == pytest.approx(6.0)


def test_percentiles_are_values_of_the_sample() -> None:
    values = [float(n) for n in range(1, 101)]
    assert (percentile(values, 0.5), percentile(values, 0.99)) == (50.0, 99.0)


def test_topologies_host_each_stage_once_and_count_workers() -> None:
    assert set(topologies(2, has_pictures=False)) == {"1P 1D", "1PD", "2PD"}
    assert {"1E 1P 1D", "2EPD", "1D 1EP", "1P 1ED", "2E 1PD"} <= set(
        topologies(3, has_pictures=True)
    )
    assert max(map(cost_of, topologies(4, has_pictures=True))) == 4


class TestSearch:
    SPACE = tuple(
        Choice(topology, batch, 4096)
        for topology in topologies(4, has_pictures=True)
        for batch in (1, 8, 64)
    )

    @staticmethod
    def worth(choice: Choice) -> float:
        return {1: 1.0, 8: 4.0, 64: 2.0}[choice.max_batch] * cost_of(choice.topology)

    def test_a_small_space_gives_its_best(self) -> None:
        plans = search(self.SPACE, self.worth, beta=0.5, num_trials=len(self.SPACE))
        assert len(plans) == len(self.SPACE)
        best = max(self.worth(each) - 0.5 * cost_of(each.topology) for each in self.SPACE)
        assert plans[0].score == best == 14.0

    def test_cost_changes_the_choice(self) -> None:
        plans = search(self.SPACE, self.worth, beta=5.0, num_trials=len(self.SPACE))
        assert cost_of(plans[0].choice.topology) == 1

    def test_a_large_space_is_sampled_and_repeats(self) -> None:
        runs = [search(self.SPACE, self.worth, beta=0.5, num_trials=40, seed=3) for _ in range(2)]
        assert runs[0] == runs[1]
        assert len(runs[0]) <= 40
        assert runs[0][0].score >= 12.0

    def test_an_empty_space_is_told(self) -> None:
        with pytest.raises(SettingsError, match="--workers"):
            search((), self.worth, beta=0.0)
