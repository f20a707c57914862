"""`triptych plan`: a trace, a profile and latency limits in, the best plans out."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from services.planner.cluster import Cluster, Limits, Links
from services.planner.goodput import attainments, forecast, goodput, rate_of
from services.planner.optimizer import Choice, Plan, search, topologies
from services.planner.perf_model import PerformanceModel
from services.planner.plot import Curve, best_of_topologies, check_plot, draw
from services.planner.report import print_forecast, print_plans, replicas
from services.planner.slo import Slo, parse_slo
from services.planner.values import FORMATS, as_yaml
from services.planner.workload import Arrival, read_trace
from shared.errors import SettingsError
from shared.runtime.flags import Parser
from shared.runtime.settings import exit_with

PROG = "triptych plan"
MAX_WORKERS = 16
NUM_SHOWN = 5
NUM_BARS = 10
NUM_CURVES = 3
CURVE_SHARES = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.3, 1.4)
"""Of the best plan's goodput: where the curves have their points."""

EPILOG = """\
A trace has one JSON object a line: arrival_s, num_prompt_tokens (pictures' tokens among them),
num_output_tokens, and optionally patches ([256, 1024]: one count per picture) and class.
A profile says how long each stage's step takes; docs/planner.md shows one.
Goodput is the highest rate at which at least 90 % of every class keeps to --slo.

examples:
  triptych plan --trace day.jsonl --profile profile.json --slo ttft=2,tpot=0.05 --workers 8
  triptych plan --trace day.jsonl --profile profile.json --slo ttft=1,tpot=0.1 --workers 4 \\
      --beta 0.5 --max-batch 16 64 --max-batch-tokens 2048 8192
  triptych plan --trace day.jsonl --profile profile.json --slo ttft=1,tpot=0.1 \
      --plot plan.svg --values plan.yaml"""


@dataclass(frozen=True, slots=True)
class Question:
    """What to plan for, and within which limits."""

    arrivals: tuple[Arrival, ...]
    model: PerformanceModel
    slo: Slo
    space: tuple[Choice, ...]
    num_blocks: int
    num_cores: int
    links: Links
    beta: float
    num_trials: int
    seed: int
    plot: Path | None
    values: Path | None
    values_format: str

    def cluster(self, choice: Choice) -> Cluster:
        """The cluster of one point of the space."""
        limits = Limits(
            max_batch=choice.max_batch,
            max_batch_tokens=choice.max_batch_tokens,
            num_blocks=self.num_blocks,
        )
        return Cluster(choice.topology, limits, self.links, self.num_cores)


def main(argv: Sequence[str]) -> None:
    try:
        plan(parse(argv), Console())
    except SettingsError as error:
        exit_with(PROG, error)
    except OSError as error:
        exit_with(PROG, SettingsError(f"{error.filename} cannot be written: {error.strerror}"))


def plan(question: Question, console: Console) -> None:
    """Search and print."""
    total = min(len(question.space), question.num_trials)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("simulating plans", total=total)
        plans = search(
            question.space,
            lambda choice: goodput(
                question.cluster(choice), question.model, question.arrivals, question.slo
            ),
            beta=question.beta,
            num_trials=question.num_trials,
            seed=question.seed,
            on_trial=lambda: progress.advance(bar),
        )
    print_plans(console, plans[:NUM_SHOWN], question.beta)
    best = plans[0].choice
    predicted = forecast(question.cluster(best), question.model, question.arrivals, question.slo)
    print_forecast(console, best.topology, predicted)
    console.print(replicas(best.topology), soft_wrap=True, highlight=False, markup=False)
    if question.values is not None:
        text = as_yaml(
            question.cluster(best), question.model.kv_bytes_per_token, question.values_format
        )
        question.values.write_text(text, encoding="utf-8")
    if question.plot is not None:
        _draw(question, question.plot, plans)


def _draw(question: Question, path: Path, plans: Sequence[Plan]) -> None:
    shown = best_of_topologies(plans, NUM_BARS)
    slo = question.slo
    title = f"TTFT within {slo.ttft_s:g} s, TPOT within {slo.tpot_s * 1000:g} ms"
    draw(path, shown, _curves(question, shown[:NUM_CURVES]), title)


def _curves(question: Question, plans: Sequence[Plan]) -> list[Curve]:
    """Around the best goodput; none where no plan has any."""
    top = max(plan.goodput for plan in plans)
    if not top:
        return []
    rates = tuple(top * share for share in CURVE_SHARES)
    curves = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for plan in progress.track(plans, description="simulating rates"):
            cluster = question.cluster(plan.choice)
            shares = attainments(cluster, question.model, question.arrivals, question.slo, rates)
            curves.append(Curve(plan.choice.topology, rates, shares))
    return curves


def parse(argv: Sequence[str]) -> Question:
    """The command line as a question, its files read. Raises `SettingsError`."""
    given = _parser().parse_all(argv)
    for name in ("workers", "kv_blocks", "trials", "max_batch", "max_batch_tokens"):
        value = getattr(given, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            raise SettingsError(f"--{name.replace('_', '-')} = {value}: should be at least 1")
    if given.workers > MAX_WORKERS:
        raise SettingsError(f"--workers = {given.workers}: at most {MAX_WORKERS} are allowed")
    if given.cores < 0:
        raise SettingsError(f"--cores = {given.cores}: should be 0 or more")
    if not (math.isfinite(given.beta) and given.beta >= 0):
        raise SettingsError(f"--beta = {given.beta}: should be 0 or more")
    if given.bytes_per_s is not None and not 0 < given.bytes_per_s < math.inf:
        raise SettingsError(f"--bytes-per-s = {given.bytes_per_s}: should be above 0")
    arrivals = read_trace(given.trace)
    if not math.isfinite(rate_of(arrivals)):
        raise SettingsError(f"--trace = {given.trace}: all requests come at once: it has no rate")
    has_pictures = any(each.patches for each in arrivals)
    space = tuple(
        Choice(topology, max_batch, max_batch_tokens)
        for topology in topologies(given.workers, has_pictures=has_pictures)
        for max_batch in sorted(set(given.max_batch))
        for max_batch_tokens in sorted(set(given.max_batch_tokens))
    )
    if given.plot is not None:
        check_plot(given.plot)
    if given.values is not None and not given.values.parent.is_dir():
        folder = given.values.parent
        raise SettingsError(f"--values = {given.values}: there is no folder {folder}")
    model = _read_profile(given.profile)
    return Question(
        arrivals=arrivals,
        model=model,
        slo=parse_slo(given.slo),
        space=space,
        num_blocks=given.kv_blocks,
        num_cores=given.cores,
        links=_links(model, given.bytes_per_s),
        beta=given.beta,
        num_trials=given.trials,
        seed=given.seed,
        plot=given.plot,
        values=given.values,
        values_format=given.values_format,
    )


def _parser() -> Parser:
    parser = Parser(
        prog=PROG,
        description="Finds how many workers of which kind a load needs, by simulating it.",
        epilog=EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--trace", type=Path, required=True, metavar="FILE", help="requests, JSONL [required]")
    add("--profile", type=Path, required=True, metavar="FILE", help="step times [required]")
    add("--slo", required=True, metavar="ttft=S,tpot=S", help="limits in seconds [required]")
    add("--workers", type=int, default=4, help=f"most workers [1 to {MAX_WORKERS}; default 4]")
    add("--beta", type=float, default=0.0, help="requests/s that a worker must bring [default 0]")
    add("--max-batch", type=int, nargs="+", default=[64], help="sequences to try [default 64]")
    add("--max-batch-tokens", type=int, nargs="+", default=[4096], help="to try [default 4096]")
    add("--kv-blocks", type=int, default=4096, help="of 16 tokens per process [default 4096]")
    add("--cores", type=int, default=0, help="that all workers share; 0: a device each [default 0]")
    add("--bytes-per-s", type=float, help="between workers [default: as the profile says]")
    add("--trials", type=int, default=64, help="plans to simulate at most [default 64]")
    add("--seed", type=int, default=0, help="of the search [default 0]")
    add("--plot", type=Path, metavar="FILE", help="draw the plans, as .png or .svg")
    add("--values", type=Path, metavar="FILE", help="write the best plan for an orchestrator")
    add("--values-format", choices=FORMATS, default=FORMATS[0], help="[default compose]")
    return parser


def _links(model: PerformanceModel, bytes_per_s: float | None) -> Links:
    """Those of the profile, else usual ones; the network between workers may be another."""
    links = model.links or Links()
    return links if bytes_per_s is None else replace(links, bytes_per_s=bytes_per_s)


def _read_profile(path: Path) -> PerformanceModel:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--profile = {path}: cannot be read: {error}") from None
    return PerformanceModel.from_json(text, f"--profile = {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
