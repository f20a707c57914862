"""Forks one process per delayed worker from one that has imported everything: quick and light.

In: a topology, a performance model, the workers' common arguments. Each child runs the very entry
point of production (`triptych encoder`, ..., `triptych worker`); its settings may also come from
`TRIPTYCH_*` variables. Stops all when it is told to, or when the first of them ends.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess
from pathlib import Path

from bench.delayed.models import delayed_models
from services.launcher.plan import SERVICES
from services.planner.perf_model import PerformanceModel
from services.stages import run_stage, run_worker
from shared.runtime.lifecycle import DIE_WITH_PARENT, die_with_parent
from shared.runtime.topology import Stages, parse_topology

STOP_TIMEOUT_S = 30.0
PRELOADED = ("transformers", *(f"services.{name}.build" for name in SERVICES.values()))


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m bench.delayed", description=__doc__)
    parser.add_argument("--workers", required=True, help="such as '5E 1P 2D'")
    parser.add_argument("--profile", type=Path, required=True, help="performance model, JSON")
    parser.add_argument("--encoder-held", type=int, help="--max-held of workers that only encode")
    options, arguments = parser.parse_known_args(argv)
    timing = PerformanceModel.from_json(options.profile.read_text(), str(options.profile))
    workers = parse_topology(options.workers, "--workers")
    for module in PRELOADED:
        importlib.import_module(module)
    die_with_parent()
    os.environ[DIE_WITH_PARENT] = "1"
    own = {}
    if options.encoder_held:
        own["encoder"] = ["--max-held", str(options.encoder_held)]
    if any(run(workers, timing, arguments, own)):
        raise SystemExit(1)


def run(
    workers: Sequence[Stages],
    timing: PerformanceModel,
    arguments: Sequence[str],
    own: Mapping[str, Sequence[str]],
) -> list[int | None]:
    """Fork them, wait, stop them all; their exit codes. `own` adds arguments by service."""
    fork = multiprocessing.get_context("fork")
    children = [
        fork.Process(
            target=_serve,
            args=(
                stages,
                ["--name", name, *arguments, *own.get(name.rsplit("-", 1)[0], ())],
                timing,
            ),
        )
        for name, stages in named(workers)
    ]
    for child in children:
        child.start()

    def stop(*_: object) -> None:
        for child in children:
            child.terminate()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    wait([child.sentinel for child in children])
    stop()
    for child in children:
        _end(child)
    return [child.exitcode for child in children]


def named(workers: Sequence[Stages]) -> list[tuple[str, Stages]]:
    """A name for each, as the launcher gives them."""
    numbers: Counter[str] = Counter()
    names = []
    for stages in workers:
        service = SERVICES[stages[0]] if len(stages) == 1 else "worker"
        names.append((f"{service}-{numbers[service]}", stages))
        numbers[service] += 1
    return names


def _serve(stages: Stages, arguments: Sequence[str], timing: PerformanceModel) -> None:
    with delayed_models(timing):
        if len(stages) == 1:
            run_stage(stages[0], arguments)
        else:
            run_worker(["--stages", ",".join(stages), *arguments])


def _end(child: ForkProcess) -> None:
    child.join(STOP_TIMEOUT_S)
    if child.is_alive():
        child.kill()
        child.join()
