"""How many workers each stage should have, for an orchestrator that scales them. Pure.

More are wanted at once where a stage's load is above `high_load`; fewer only when fewer have been
enough for `cooldown_s` without a break. Between the two lies a gap: the counts do not swing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from services.planner.online.decision import Policy
from services.planner.online.load import Observation, capacities, demands
from shared.messages.control import STAGES, Role


@dataclass(frozen=True, slots=True)
class Advice:
    """Workers wanted for one stage; since when fewer would do, and the most that then would."""

    count: int
    fewer_since_s: float | None = None
    fewer_count: int = 0


@dataclass(frozen=True, slots=True)
class Advices:
    """Of every stage; empty before the first look."""

    of: Mapping[Role, Advice] = field(default_factory=dict)

    @property
    def counts(self) -> dict[Role, int]:
        """Workers wanted of each stage."""
        return {stage: advice.count for stage, advice in self.of.items()}


def advise(
    policy: Policy, advices: Advices, observed: Observation, now_s: float, *, max_workers: int
) -> Advices:
    """The advice after this look. A cluster that has encoded nothing so far needs no encoder."""
    demand = demands(observed, policy.targets)
    present = capacities(observed.workers)
    found = {}
    for stage in STAGES:
        before = advices.of.get(stage) or Advice(math.ceil(present[stage]))
        needed = min(max_workers, math.ceil(demand[stage]))
        if stage is not Role.ENCODE or before.count or present[stage]:
            needed = max(1, needed)
        found[stage] = _changed(policy, before, needed, demand[stage], now_s)
    return Advices(found)


def _changed(policy: Policy, before: Advice, needed: int, demand: float, now_s: float) -> Advice:
    if needed > before.count:
        is_high = demand > policy.high_load * before.count
        return Advice(needed if is_high else max(1, before.count))
    if needed == before.count:
        return Advice(before.count)
    if before.fewer_since_s is None:
        return replace(before, fewer_since_s=now_s, fewer_count=needed)
    most = max(needed, before.fewer_count)
    if now_s - before.fewer_since_s >= policy.cooldown_s:
        return Advice(most)
    return replace(before, fewer_count=most)
