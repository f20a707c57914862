"""What `planner_accuracy` measured, as a file: a change of the simulator is then judged again
without serving anything.

In and out: a `Recording`. JSON, numbers as they are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from bench.planner_load import Served
from bench.planner_speed import Pace
from bench.planner_trials import Trial
from services.planner.cluster import Cluster
from services.planner.perf_model import PerformanceModel
from services.planner.slo import Slo
from services.planner.workload import Arrival
from shared.errors import SettingsError


@dataclass(frozen=True)
class Chunk:
    """Some seconds at one rate: what was sent and served, and what the machine was meanwhile.
    `foreign_share` is of the CPU time that others took."""

    rate_per_s: float
    arrivals: Sequence[Arrival]
    served: Sequence[Served]
    paces: Sequence[Pace]
    foreign_share: float


@dataclass(frozen=True)
class Recording:
    """A run: the system as far as a profile tells, trials, a chunk of each rate, trials, and so on.

    There is one set of trials more than there are rounds of chunks.
    """

    cluster: Cluster
    model: PerformanceModel
    slo: Slo
    trials: Sequence[Sequence[Trial]]
    rounds: Sequence[Sequence[Chunk]]

    def write(self, path: Path) -> None:
        """Raises `OSError`."""
        path.write_text(json.dumps(asdict(self), default=_plain), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Recording:
        """Raises `SettingsError`."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return TypeAdapter(cls).validate_python(values)
        except (OSError, ValueError, ValidationError) as error:
            raise SettingsError(f"--replay = {str(path)!r}: cannot be read: {error}") from None


def _plain(value: object) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(by_alias=True)
    raise TypeError(f"{type(value).__name__} has no JSON form")
