"""Which worker should change its role now, if any. Pure: it takes `now_s` and returns values.

The stage with the highest load is hot once that has been above `high_load` for `hold_s`. Among all
switches of one worker to the hot stage that leave no stage without a worker, the one that gives the
lowest highest load is chosen, if that is at most `gain` times what it is: a switch that would soon
be worth undoing is never made. After each there is peace for `cooldown_s`, and there are at most
`max_switches` in `window_s`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from services.planner.online.load import (
    Observation,
    Targets,
    WorkerView,
    capacities,
    demands,
    loads,
)
from shared.errors import SettingsError
from shared.messages.control import Role
from shared.runtime.topology import Stages, name_of


@dataclass(frozen=True, slots=True)
class Policy:
    """When a switch is worth it."""

    targets: Targets
    high_load: float = 1.5
    gain: float = 0.75
    hold_s: float = 5.0
    cooldown_s: float = 30.0
    max_switches: int = 6
    window_s: float = 600.0

    def __post_init__(self) -> None:
        if not 0 < self.gain < 1:
            raise SettingsError(f"gain is {self.gain}, it must be between 0 and 1")


@dataclass(frozen=True, slots=True)
class Switch:
    """One worker's new role."""

    worker: str
    before: Stages
    after: Stages
    reason: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """A switch that did not take place, and until when it is not asked for again."""

    worker: str
    after: Stages
    until_s: float


@dataclass(frozen=True, slots=True)
class State:
    """What the past means for the next decision; `switched_s` are the times within the window."""

    hot: Role | None = None
    hot_since_s: float = 0.0
    switched_s: tuple[float, ...] = ()
    refusals: tuple[Refusal, ...] = field(default_factory=tuple)

    def ended(self, now_s: float) -> State:
        """The switch that was decided last has ended: peace begins now."""
        return replace(self, hot=None, switched_s=(*self.switched_s[:-1], now_s))

    def refused(self, switch: Switch, now_s: float, policy: Policy) -> State:
        """It did not take place. It counts all the same: it took the system's time."""
        refusal = Refusal(switch.worker, switch.after, now_s + policy.window_s)
        return replace(self.ended(now_s), refusals=(*self.refusals, refusal))


def decide(
    policy: Policy, state: State, observed: Observation, now_s: float
) -> tuple[State, Switch | None]:
    """The state after this look, and the switch to make now, if any."""
    state = _forgetful(policy, state, now_s)
    demand = demands(observed, policy.targets)
    load = loads(demand, observed.workers)
    hot = max(load, key=lambda stage: load[stage])
    if load[hot] <= policy.high_load:
        return replace(state, hot=None), None
    if state.hot is not hot:
        state = replace(state, hot=hot, hot_since_s=now_s)
    if now_s - state.hot_since_s < policy.hold_s or not _is_allowed(policy, state, now_s):
        return state, None
    best: tuple[float, int, str] | None = None
    chosen: WorkerView | None = None
    for worker, rest in _donors(observed, hot):
        if any((each.worker, each.after) == (worker.name, (hot,)) for each in state.refusals):
            continue
        after = (*rest, WorkerView(worker.name, (hot,)))
        rank = max(loads(demand, after).values()), len(worker.stages), worker.name
        if best is None or rank < best:
            best, chosen = rank, worker
    if best is None or chosen is None or not best[0] <= policy.gain * load[hot]:
        return state, None
    reason = (
        f"{hot.value} has a load of {load[hot]:.2f}; with {chosen.name} "
        f"({name_of(chosen.stages)}) no stage has more than {best[0]:.2f}"
    )
    state = replace(state, hot=None, switched_s=(*state.switched_s, now_s))
    return state, Switch(chosen.name, chosen.stages, (hot,), reason)


def _forgetful(policy: Policy, state: State, now_s: float) -> State:
    """Without what is too long ago to count."""
    return replace(
        state,
        switched_s=tuple(s for s in state.switched_s if now_s - s < policy.window_s),
        refusals=tuple(each for each in state.refusals if now_s < each.until_s),
    )


def _is_allowed(policy: Policy, state: State, now_s: float) -> bool:
    last_s = state.switched_s[-1] if state.switched_s else -math.inf
    return now_s - last_s >= policy.cooldown_s and len(state.switched_s) < policy.max_switches


def _donors(
    observed: Observation, hot: Role
) -> Iterator[tuple[WorkerView, tuple[WorkerView, ...]]]:
    """Workers that could serve the hot stage alone, each with those that stay as they are.

    Every other stage of a donor keeps a worker.
    """
    for worker in observed.workers:
        rest = tuple(each for each in observed.workers if each is not worker)
        kept = capacities(rest)
        if worker.stages != (hot,) and all(
            kept[stage] for stage in worker.stages if stage is not hot
        ):
            yield worker, rest
