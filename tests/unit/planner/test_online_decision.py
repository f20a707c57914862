"""Role switches: when one is worth it, and that they neither flap, hurry nor strand a stage."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from services.planner.online.decision import Policy, State, Switch, decide
from services.planner.online.load import Observation, Targets, WorkerView, demands, loads
from shared.errors import SettingsError
from shared.messages.control import Role
from shared.runtime.topology import parse_topology

E, P, D = Role.ENCODE, Role.PREFILL, Role.DECODE
POLICY = Policy(
    Targets({E: 4.0, P: 4.0, D: 16.0}, wait_s=1.0),
    hold_s=5.0,
    cooldown_s=30.0,
    max_switches=3,
    window_s=600.0,
)


def workers(topology: str) -> tuple[WorkerView, ...]:
    return tuple(WorkerView(f"w{i}", stages) for i, stages in enumerate(parse_topology(topology)))


def seen(topology: str, *, e: int = 0, p: int = 0, d: int = 0) -> Observation:
    return Observation(workers(topology), {E: e, P: p, D: d})


def settled(observed: Observation, policy: Policy = POLICY) -> Switch | None:
    """What is decided once a load has lasted."""
    state, first = decide(policy, State(), observed, 0.0)
    assert first is None
    return decide(policy, state, observed, policy.hold_s)[1]


def applied(observed: Observation, switch: Switch) -> Observation:
    """The system after the switch."""
    moved = tuple(
        WorkerView(each.name, switch.after) if each.name == switch.worker else each
        for each in observed.workers
    )
    return replace(observed, workers=moved)


class TestLoad:
    def test_is_tasks_over_what_full_workers_have(self) -> None:
        observed = seen("2E 1P 1D", e=8, p=8, d=8)
        load = loads(demands(observed, POLICY.targets), observed.workers)
        assert load == {E: 1.0, P: 2.0, D: 0.5}

    def test_a_bridge_counts_for_its_share_of_each_stage(self) -> None:
        observed = seen("1PD 1D", p=4, d=24)
        load = loads(demands(observed, POLICY.targets), observed.workers)
        assert load == {E: 0.0, P: 2.0, D: 1.0}

    def test_waiting_tells_of_tasks_that_are_larger_than_usual(self) -> None:
        observed = replace(seen("2P 1D", p=2), waits_s={P: 3.0})
        assert demands(observed, POLICY.targets)[P] == 6.0

    def test_the_waiting_of_an_empty_queue_is_over(self) -> None:
        observed = replace(seen("2P 1D", p=0), waits_s={P: 3.0})
        assert demands(observed, POLICY.targets)[P] == 0.0

    def test_tasks_without_a_worker_are_an_infinite_load(self) -> None:
        observed = seen("1P 1D", e=1)
        assert loads(demands(observed, POLICY.targets), observed.workers)[E] == math.inf


class TestWhichWorker:
    def test_an_idle_encoder_helps_decode(self) -> None:
        switch = settled(seen("5E 1P 2D", e=2, p=1, d=80))
        assert switch is not None
        assert (switch.before, switch.after) == ((E,), (D,))
        assert "decode has a load of 2.50" in switch.reason

    def test_encoders_gain_workers_too(self) -> None:
        switch = settled(seen("1E 1P 3D", e=20, p=2, d=4))
        assert switch is not None
        assert (switch.before, switch.after) == ((D,), (E,))

    def test_a_stage_that_lost_all_its_workers_gets_one(self) -> None:
        switch = settled(seen("2P 2D", e=3, p=2, d=2))
        assert switch is not None
        assert switch.after == (E,)

    def test_a_bridge_may_give_up_a_stage_that_others_host(self) -> None:
        switch = settled(seen("1PD 1P", p=8, d=60))
        assert switch == Switch("w0", (P, D), (D,), switch.reason if switch else "")

    @pytest.mark.parametrize("topology", ["1E 1P 1D", "1EP 1D", "1PD 1E", "1EPD"])
    def test_no_stage_is_left_without_a_worker(self, topology: str) -> None:
        for busy in ({"e": 500}, {"p": 500}, {"d": 5000}):
            assert settled(seen(topology, **busy)) is None

    def test_nothing_moves_where_everything_is_busy(self) -> None:
        assert settled(seen("2E 2P 2D", e=40, p=40, d=160)) is None

    def test_nothing_moves_where_nothing_is_busy(self) -> None:
        assert settled(seen("2E 2P 2D", e=2, p=1, d=9)) is None

    def test_a_gain_that_is_too_small_is_not_worth_it(self) -> None:
        # 2.0 would become 1.6, with encode at 1.6 as well.
        observed = seen("4E 4P 1D", e=19, p=32, d=2)
        assert settled(observed) is None
        assert settled(observed, replace(POLICY, gain=0.85)) is not None


class TestPeace:
    BUSY = seen("5E 1P 2D", e=2, p=1, d=160)

    def test_a_load_has_to_last(self) -> None:
        state, switch = decide(POLICY, State(), self.BUSY, 0.0)
        state, switch = decide(POLICY, state, self.BUSY, 4.9)
        assert switch is None
        state, switch = decide(POLICY, state, seen("5E 1P 2D"), 5.0)
        state, switch = decide(POLICY, state, self.BUSY, 5.1)
        assert switch is None
        state, switch = decide(POLICY, state, self.BUSY, 10.2)
        assert switch is not None

    def test_another_hot_stage_begins_anew(self) -> None:
        state, _ = decide(POLICY, State(), self.BUSY, 0.0)
        state, switch = decide(POLICY, state, seen("1E 4P 2D", e=30), 5.0)
        assert switch is None
        assert state.hot is E

    def test_cooldown_counts_from_the_end_of_a_switch(self) -> None:
        state = State()
        times = []
        observed = self.BUSY
        for tenth in range(1000):
            now_s = tenth / 10
            state, switch = decide(POLICY, state, observed, now_s)
            if switch is not None:
                times.append(now_s)
                state = state.ended(now_s + 4.0)
                observed = applied(observed, switch)
        assert times[0] == 5.0
        assert len(times) >= 2
        assert all(b - a >= POLICY.cooldown_s + 4.0 for a, b in pairwise(times))

    def test_switches_in_a_window_are_bounded(self) -> None:
        policy = replace(POLICY, cooldown_s=0.0, hold_s=0.0)
        state = State()
        times = []
        for now_s in range(1, 1400):
            # Whatever is done, the load returns.
            state, switch = decide(policy, state, self.BUSY, float(now_s))
            if switch is not None:
                times.append(now_s)
                state = state.ended(float(now_s))
        assert times == [1, 2, 3, 601, 602, 603, 1201, 1202, 1203]
        assert len(state.switched_s) <= policy.max_switches

    @pytest.mark.parametrize("topology", ["5E 1P 2D", "2E 2P 2D", "1E 1PD 3P 1D", "2EP 2PD 2D"])
    @pytest.mark.parametrize("depths", [(2, 1, 160), (40, 0, 20), (9, 30, 40), (12, 12, 48)])
    def test_a_steady_load_comes_to_rest(self, topology: str, depths: tuple[int, int, int]) -> None:
        """Every switch lowers the highest load, so no switch is ever taken back."""
        policy = replace(POLICY, cooldown_s=0.0, hold_s=0.0, max_switches=1000)
        e, p, d = depths
        observed, state, visited = seen(topology, e=e, p=p, d=d), State(), set()
        for now_s in range(100):
            state, switch = decide(policy, state, observed, float(now_s))
            if switch is None:
                break
            observed = applied(observed, switch)
            assert observed.workers not in visited
            visited.add(observed.workers)
            assert {E, P, D} == {stage for each in observed.workers for stage in each.stages}
        else:
            pytest.fail("it never came to rest")

    def test_a_load_that_swings_does_not_make_the_workers_swing(self) -> None:
        swing = (seen("2E 1P 2D", e=16, p=2, d=20), seen("2E 1P 2D", e=5, p=2, d=40))
        state, num_switches = State(), 0
        for second in range(600):
            state, switch = decide(POLICY, state, swing[second // 4 % 2], float(second))
            num_switches += switch is not None
        assert num_switches == 0

    def test_a_refused_switch_is_not_asked_for_again(self) -> None:
        policy = replace(POLICY, cooldown_s=0.0, hold_s=0.0, max_switches=100)
        state, switch = decide(policy, State(), self.BUSY, 0.0)
        tried = set()
        while switch is not None:
            assert switch.worker not in tried
            tried.add(switch.worker)
            state = state.refused(switch, 0.0, policy)
            state, switch = decide(policy, state, self.BUSY, 1.0)
        assert tried == {f"w{i}" for i in range(5)}
        _, again = decide(policy, state, self.BUSY, 601.0)
        assert again is not None


@pytest.mark.parametrize("gain", [0.0, 1.0])
def test_a_policy_that_could_flap_is_refused(gain: float) -> None:
    with pytest.raises(SettingsError, match=r"gain is"):
        replace(POLICY, gain=gain)
