"""What `triptych plan` prints: the best plans, the first one's forecast, its replica counts."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from services.planner.goodput import Forecast
from services.planner.optimizer import Plan

SERVICES = {"E": "encoder", "P": "prefill", "D": "decode"}
"""The deployments under deploy/ that a stage has to itself."""


def print_plans(console: Console, plans: Sequence[Plan], beta: float) -> None:
    """One line for each plan, the best first."""
    table = Table(title=f"best plans (score = goodput - {beta:g} * workers)")
    for name in ("topology", "max-batch", "max-batch-tokens", "goodput req/s", "score"):
        table.add_column(name, justify="left" if name == "topology" else "right")
    for plan in plans:
        choice = plan.choice
        numbers = (str(choice.max_batch), str(choice.max_batch_tokens))
        table.add_row(choice.topology, *numbers, f"{plan.goodput:.2f}", f"{plan.score:.2f}")
    console.print(table)


def print_forecast(console: Console, topology: str, forecast: Forecast) -> None:
    """The plan at the trace's own rate, class by class."""
    table = Table(title=f"{topology} at the trace's rate (p50 / p90 / p99)")
    table.add_column("class")
    for name in ("requests", "TTFT s", "TPOT ms", "attained"):
        table.add_column(name, justify="right")
    for each in forecast.classes:
        ttft = " / ".join(f"{value:.3f}" for value in each.ttft_s)
        tpot = " / ".join(f"{value * 1000:.1f}" for value in each.tpot_s)
        attained = f"{each.attainment:.1%}"
        table.add_row(each.kind, str(each.num_requests), ttft, tpot, attained)
    console.print(table)
    blocks = ", ".join(map(str, forecast.peak_blocks))
    console.print(f"most KV blocks in use, worker by worker: {blocks}")


def replicas(topology: str) -> str:
    """How to start the topology with deploy/: commands for compose and Kubernetes, or, where
    stages share a process, for `triptych up`."""
    counts = {word.lstrip("0123456789"): word.rstrip("EPD") for word in topology.split()}
    if not set(counts) <= set(SERVICES):
        return f'triptych up --topology "{topology}"'
    names = [(SERVICES[kind], count) for kind, count in counts.items()]
    scales = " ".join(f"--scale {name}={count}" for name, count in names)
    lines = [f"docker compose -f deploy/compose.yaml up {scales}"]
    lines += [f"kubectl scale deployment/{name} --replicas={count}" for name, count in names]
    return "\n".join(lines)
