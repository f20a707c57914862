"""The planner's choice against random configurations of as many workers: goodput, simulated.

Everything is simulated time with the services' own schedulers; nothing is served. Both sides come
from the same space: every topology of exactly so many workers, times batch limits. The random side
is the mean of some points drawn without replacement, the planner's side the best point that its
search finds. The step times are assumed, those of a model of about 7 B parameters on a device with
about 2 TB/s and 300 TFLOP/s; `--profile FILE` takes measured ones. Prints the ratio last.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from services.planner.cluster import Cluster, Limits, Links
from services.planner.fit import Fit
from services.planner.goodput import goodput
from services.planner.optimizer import Choice, Plan, cost_of, search, topologies
from services.planner.perf_model import PerformanceModel
from services.planner.slo import Slo, parse_slo
from services.planner.workload import Arrival, Shape, poisson

ASSUMED = PerformanceModel(
    encode=Fit(coefficients=(0.008, 6e-5)),
    prefill=Fit(coefficients=(0.012, 6e-5, 2e-9)),
    decode=Fit(coefficients=(0.009, 4e-8, 1.2e-4)),
    preprocess=Fit(coefficients=(0.004, 8e-6)),
    kv_bytes_per_token=57_344,
    embedding_bytes_per_patch=1792.0,
    links=Links(bytes_per_s=1e10, store_s=0.002, step_s=0.0003),
)
MIX = (
    Shape("text", 400, 128, weight=0.2),
    Shape("image", 1300, 96, (4096,), weight=0.5),
    Shape("images", 4300, 96, (4096, 4096, 4096, 4096), weight=0.3),
)
MAX_BATCH = (1, 8, 32, 128)
MAX_BATCH_TOKENS = (1024, 4096, 16_384)
NUM_BLOCKS = 8192
BASE_RATE = 4.0


@dataclass(frozen=True)
class Duel:
    """Both sides of one run."""

    planned: Plan
    drawn: tuple[Plan, ...]

    @property
    def mean(self) -> float:
        """Goodput of a random configuration."""
        return statistics.mean(plan.goodput for plan in self.drawn)

    @property
    def ratio(self) -> float:
        """How many times the goodput of a random configuration the planner's choice has."""
        return self.planned.goodput / self.mean if self.mean else float("inf")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m bench optimizer", description=__doc__)
    parser.add_argument("--workers", type=int, default=8, help="of every configuration (8)")
    parser.add_argument("--random", type=int, default=10, help="configurations drawn (10)")
    parser.add_argument("--trials", type=int, default=48, help="points that the search tries (48)")
    parser.add_argument("--requests", type=int, default=250, help="of the simulated load (250)")
    parser.add_argument("--seed", type=int, default=0, help="of load, search and drawing (0)")
    parser.add_argument("--slo", default="ttft=2,tpot=0.04", help="limits (ttft=2,tpot=0.04)")
    parser.add_argument("--profile", type=Path, help="measured step times instead of assumed ones")
    parser.add_argument("--plot", type=Path, help="file for a plot, .png or .svg")
    options = parser.parse_args()
    model = ASSUMED
    if options.profile:
        text = options.profile.read_text(encoding="utf-8")
        model = PerformanceModel.from_json(text, str(options.profile))
    duel = run(options, model, parse_slo(options.slo))
    print(table(duel))
    if options.plot:
        draw(options.plot, duel)
    print(f"goodput, planner over mean of {len(duel.drawn)} random: ratio {duel.ratio:.2f}")


def space(num_workers: int) -> tuple[Choice, ...]:
    """Every configuration that uses all the workers."""
    return tuple(
        Choice(topology, max_batch, max_batch_tokens)
        for topology in topologies(num_workers, has_pictures=True)
        if cost_of(topology) == num_workers
        for max_batch in MAX_BATCH
        for max_batch_tokens in MAX_BATCH_TOKENS
    )


def run(options: argparse.Namespace, model: PerformanceModel, slo: Slo) -> Duel:
    """Draw, then search, over the same load."""
    arrivals = poisson(MIX, rate_per_s=BASE_RATE, num_requests=options.requests, seed=options.seed)
    points = space(options.workers)
    drawn = random.Random(options.seed).sample(points, options.random)
    with Progress(transient=True) as progress:
        bar = progress.add_task("simulating", total=len(drawn) + min(options.trials, len(points)))
        taken = []
        for choice in drawn:
            rate = _goodput(choice, model, arrivals, slo)
            taken.append(Plan(choice, rate, rate))
            progress.advance(bar)
        best, *_ = search(
            points,
            lambda choice: _goodput(choice, model, arrivals, slo),
            beta=0.0,
            num_trials=options.trials,
            seed=options.seed,
            on_trial=lambda: progress.advance(bar),
        )
    return Duel(best, tuple(taken))


def _goodput(
    choice: Choice, model: PerformanceModel, arrivals: Sequence[Arrival], slo: Slo
) -> float:
    limits = Limits(
        max_batch=choice.max_batch,
        max_batch_tokens=choice.max_batch_tokens,
        num_blocks=NUM_BLOCKS,
    )
    return goodput(Cluster(choice.topology, limits, model.links or Links()), model, arrivals, slo)


def table(duel: Duel) -> str:
    """One line for each configuration, the planner's first."""
    lines = [f"{'':8}{'topology':<14}{'max-batch':>10}{'max-batch-tokens':>18}{'goodput/s':>11}"]
    sides = [("planner", duel.planned), *(("random", plan) for plan in duel.drawn)]
    for side, plan in sides:
        choice = plan.choice
        lines.append(
            f"{side:8}{choice.topology:<14}{choice.max_batch:>10}"
            f"{choice.max_batch_tokens:>18}{plan.goodput:>11.2f}"
        )
    return "\n".join(lines)


def draw(path: Path, duel: Duel) -> None:
    """Bars of goodput, and the random ones' mean as a line."""
    from matplotlib.figure import Figure

    ranked = sorted(duel.drawn, key=lambda plan: -plan.goodput)
    names = [
        f"{plan.choice.topology}, {plan.choice.max_batch} x {plan.choice.max_batch_tokens}"
        for plan in (duel.planned, *ranked)
    ]
    figure = Figure(figsize=(8.0, 4.4), layout="constrained", dpi=150)
    axes = figure.subplots()
    bars = axes.barh(
        range(len(names)),
        [plan.goodput for plan in (duel.planned, *ranked)],
        color=["#0b6e8f", *["#b8c4ca"] * len(ranked)],
    )
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.axvline(duel.mean, color="#d1682e", lw=1.2, label=f"mean of random: {duel.mean:.2f}")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("goodput (requests/s, simulated)")
    axes.set_title(f"planner over mean of random: {duel.ratio:.2f}", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path)


if __name__ == "__main__":
    main()
