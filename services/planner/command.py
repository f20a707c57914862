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
from services.planner.goodput import forecast, goodput, rate_of
from services.planner.optimizer import Choice, search, topologies
from services.planner.perf_model import PerformanceModel
from services.planner.report import print_forecast, print_plans, replicas
from services.planner.slo import Slo, parse_slo
from services.planner.workload import Arrival, read_trace
from shared.errors import SettingsError
from shared.runtime.flags import Parser
from shared.runtime.settings import exit_with

PROG = "triptych plan"
MAX_WORKERS = 16
NUM_SHOWN = 5
EPILOG = """\
A trace has one JSON object a line: arrival_s, num_prompt_tokens (pictures' tokens among them),
num_output_tokens, and optionally patches ([256, 1024]: one count per picture) and class.
A profile says how long each stage's step takes; docs/planner.md shows one.
Goodput is the highest rate at which at least 90 % of every class keeps to --slo.

examples:
  triptych plan --trace day.jsonl --profile profile.json --slo ttft=2,tpot=0.05 --workers 8
  triptych plan --trace day.jsonl --profile profile.json --slo ttft=1,tpot=0.1 --workers 4 \\
      --beta 0.5 --max-batch 16 64 --max-batch-tokens 2048 8192"""


@dataclass(frozen=True, slots=True)
class Question:
    """What to plan for, and within which limits."""

    arrivals: tuple[Arrival, ...]
    model: PerformanceModel
    slo: Slo
    space: tuple[Choice, ...]
    num_blocks: int
    links: Links
    beta: float
    num_trials: int
    seed: int

    def cluster(self, choice: Choice) -> Cluster:
        """The cluster of one point of the space."""
        limits = Limits(
            max_batch=choice.max_batch,
            max_batch_tokens=choice.max_batch_tokens,
            num_blocks=self.num_blocks,
        )
        return Cluster(choice.topology, limits, self.links)


def main(argv: Sequence[str]) -> None:
    try:
        plan(parse(argv), Console())
    except SettingsError as error:
        exit_with(PROG, error)


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


def parse(argv: Sequence[str]) -> Question:
    """The command line as a question, its files read. Raises `SettingsError`."""
    given = _parser().parse_all(argv)
    for name in ("workers", "kv_blocks", "trials", "max_batch", "max_batch_tokens"):
        value = getattr(given, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            raise SettingsError(f"--{name.replace('_', '-')} = {value}: should be at least 1")
    if given.workers > MAX_WORKERS:
        raise SettingsError(f"--workers = {given.workers}: at most {MAX_WORKERS} are allowed")
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
    model = _read_profile(given.profile)
    return Question(
        arrivals=arrivals,
        model=model,
        slo=parse_slo(given.slo),
        space=space,
        num_blocks=given.kv_blocks,
        links=_links(model, given.bytes_per_s),
        beta=given.beta,
        num_trials=given.trials,
        seed=given.seed,
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
    add("--bytes-per-s", type=float, help="between workers [default: as the profile says]")
    add("--trials", type=int, default=64, help="plans to simulate at most [default 64]")
    add("--seed", type=int, default=0, help="of the search [default 0]")
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
