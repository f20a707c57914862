"""Prometheus metrics of the planner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from prometheus_client import CollectorRegistry, Counter, Gauge

from shared.telemetry.metrics import PREFIX


@dataclass(frozen=True)
class PlannerMetrics:
    """Labels: `stage`, and the `outcome` of a switch (`done`, `refused`)."""

    desired: Gauge
    load: Gauge
    depth: Gauge
    switches: Counter

    @classmethod
    def create(cls, registry: CollectorRegistry) -> Self:
        def gauge(name: str, meaning: str) -> Gauge:
            return Gauge(f"{PREFIX}planner_{name}", meaning, ("stage",), registry=registry)

        return cls(
            desired=gauge("desired_workers", "Workers that a stage should have"),
            load=gauge("stage_load", "Load of a stage; 1 is as it should be"),
            depth=gauge("queue_depth", "Tasks of a stage, waiting or at work"),
            switches=Counter(
                f"{PREFIX}planner_switches",
                "Role switches asked for, by the stage that was to gain",
                ("stage", "outcome"),
                registry=registry,
            ),
        )
