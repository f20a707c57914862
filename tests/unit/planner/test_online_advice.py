"""The numbers that an orchestrator is told: up at once, down with patience."""

from __future__ import annotations

import pytest

from services.planner.online.advice import Advices, advise
from services.planner.online.decision import Policy
from services.planner.online.load import Observation, Targets, WorkerView
from services.planner.online.settings import PlannerSettings
from shared.errors import SettingsError
from shared.messages.control import Role
from shared.runtime.settings import load_settings
from shared.runtime.topology import parse_topology

E, P, D = Role.ENCODE, Role.PREFILL, Role.DECODE
POLICY = Policy(Targets({E: 4.0, P: 4.0, D: 16.0}, wait_s=1.0), cooldown_s=30.0)


def seen(topology: str, *, e: int = 0, p: int = 0, d: int = 0) -> Observation:
    workers = (WorkerView(f"w{i}", stages) for i, stages in enumerate(parse_topology(topology)))
    return Observation(tuple(workers), {E: e, P: p, D: d})


def look(advices: Advices, observed: Observation, now_s: float) -> Advices:
    return advise(POLICY, advices, observed, now_s, max_workers=8)


def test_more_are_wanted_at_once_and_within_the_limit() -> None:
    advices = look(Advices(), seen("1E 1P 1D", e=12, p=4, d=1600), 0.0)
    assert advices.counts == {E: 3, P: 1, D: 8}


def test_a_little_more_than_it_should_be_is_no_reason() -> None:
    # One encoder and 1.25 of demand: below the load that asks for help.
    assert look(Advices(), seen("1E 1P 1D", e=5), 0.0).counts[E] == 1
    assert look(Advices(), seen("1E 1P 1D", e=7), 0.0).counts[E] == 2


def test_fewer_are_wanted_only_after_a_while_without_a_break() -> None:
    advices = look(Advices(), seen("1E 1P 1D", e=16), 0.0)
    assert advices.counts[E] == 4
    advices = look(advices, seen("4E 1P 1D", e=4), 10.0)
    advices = look(advices, seen("4E 1P 1D", e=16), 30.0)
    advices = look(advices, seen("4E 1P 1D", e=4), 41.0)
    assert advices.counts[E] == 4
    advices = look(advices, seen("4E 1P 1D", e=8), 50.0)
    advices = look(advices, seen("4E 1P 1D", e=4), 70.0)
    assert advices.counts[E] == 4
    # As many as were needed at any time meanwhile.
    assert look(advices, seen("4E 1P 1D", e=1), 71.0).counts[E] == 2


def test_a_stage_that_a_cluster_does_without_stays_without() -> None:
    advices = look(Advices(), seen("1P 1D"), 0.0)
    assert advices.counts == {E: 0, P: 1, D: 1}
    advices = look(advices, seen("1P 1D"), 0.5)
    assert advices.counts == {E: 0, P: 1, D: 1}
    assert look(advices, seen("1P 1D", e=1), 1.0).counts[E] == 1


def test_a_stage_whose_workers_died_is_wanted_back() -> None:
    advices = look(Advices(), seen("1E 1P 1D"), 0.0)
    for now_s in (1.0, 60.0, 120.0):
        advices = look(advices, seen("1P 1D"), now_s)
        assert advices.counts[E] == 1


def test_advice_without_a_metric_is_refused() -> None:
    with pytest.raises(SettingsError, match="--advise needs --metrics-port"):
        load_settings(PlannerSettings, ["--advise"], "triptych planner")
    settings = load_settings(
        PlannerSettings, ["--targets-decode-depth", "8", "--switches-hold-s", "2"], "p"
    )
    assert settings.policy.targets.depths[D] == 8
    assert settings.policy.hold_s == 2
