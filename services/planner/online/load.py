"""How busy each stage is, from what can be seen of it. Pure.

In: who is ready, how many tasks each stage has, how long its tasks have waited. Out: demand (the
full workers that a stage could keep as busy as they should be) and load (demand over the workers
that it has; 1 is as it should be).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from shared.messages.control import STAGES, Role
from shared.runtime.topology import Stages


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A worker that takes tasks."""

    name: str
    stages: Stages


@dataclass(frozen=True, slots=True)
class Observation:
    """The system at one moment. `depths`: tasks waiting or at work; `waits_s`: mean of late."""

    workers: tuple[WorkerView, ...]
    depths: Mapping[Role, int] = field(default_factory=dict)
    waits_s: Mapping[Role, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Targets:
    """What is as it should be: tasks at a full worker, by stage, and seconds of waiting."""

    depths: Mapping[Role, float]
    wait_s: float


def capacities(workers: Sequence[WorkerView]) -> dict[Role, float]:
    """Full workers of each stage; a worker of several stages counts for its share of each."""
    found = dict.fromkeys(STAGES, 0.0)
    for worker in workers:
        for stage in worker.stages:
            found[stage] += 1 / len(worker.stages)
    return found


def demands(observed: Observation, targets: Targets) -> dict[Role, float]:
    """Full workers that each stage could use.

    Tasks tell of what is coming, waiting tells of tasks that are larger than usual; the larger
    demand of the two counts.
    """
    found = {}
    for stage, capacity in capacities(observed.workers).items():
        depth = observed.depths.get(stage, 0)
        by_depth = depth / targets.depths[stage]
        # Nobody waits where there is no task: the last ones' waiting is over.
        waited_s = observed.waits_s.get(stage, 0.0) if depth else 0.0
        found[stage] = max(by_depth, capacity * waited_s / targets.wait_s)
    return found


def loads(demand: Mapping[Role, float], workers: Sequence[WorkerView]) -> dict[Role, float]:
    """Demand over capacity; infinite where tasks wait for nobody."""
    return {
        stage: demand[stage] / capacity if capacity else (math.inf if demand[stage] else 0.0)
        for stage, capacity in capacities(workers).items()
    }
