"""The simulator against the running system: the share of good requests at three rates.

Starts every service on the demo model. A profile says what steps take; trials (single requests, and
loads of a few seconds) say what HTTP, the bus and the client add, and give the limits: multiples of
what single requests take. The rates are those at which the simulator expects the shares in
`TARGETS`. At each of them the same requests at the same times are sent over HTTP and simulated, on
as many cores as there are. Every prompt and picture is new, so that no cache answers. The compute
is real.

A machine's speed changes within seconds by more than the aim allows for. So each rate is served in
chunks of some seconds, all rates in turn, with trials before and after every third round; a probe
reads the speed of the machine all the while, and trials and chunks are simulated at the speed of
their time. No request of a comparison is part of any trial.
Limits near what a single request takes are missed by every hiccup of the machine, so the shares are
told for looser ones as well. Other load falsifies results: each round waits for a quiet machine,
and the share that others took meanwhile is printed. For each rate a table tells where the time
went, measured and simulated. Prints the largest difference in points last. `--keep FILE` writes
what was measured, `--replay FILE` judges it again with the simulator as it is now, and serves
nothing.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import track

from bench.planner_calibration import Calibrated, calibrated
from bench.planner_cores import measure_full_speed
from bench.planner_judgement import judge, limits_of, share_of, simulated_chunk
from bench.planner_load import SPANS_WAIT_S, CpuSeconds, OwnCpu, send, with_spans
from bench.planner_recording import Chunk, Recording
from bench.planner_requests import MODEL, RequestMaker
from bench.planner_speed import SpeedProbe, speed_probe
from bench.planner_trials import Trials, load_rates, num_requests
from bench.processes import ForeignLoad
from bench.server import running_server
from services.launcher.cores import own_cores
from services.planner.cluster import Cluster, Limits, Links
from services.planner.goodput import at_rate, rate_of
from services.planner.perf_model import PerformanceModel
from services.planner.profiling.command import profile
from services.planner.profiling.settings import ProfileSettings
from services.planner.slo import Slo
from shared.demo import model_dir
from shared.errors import SettingsError
from shared.runtime.settings import ComputeSettings

TARGETS = (0.97, 0.85, 0.5)
"""Shares of good requests that the simulator expects: few wait, the knee, too many come."""
NUM_ALONE = 3
"""Sets of single requests that give the limits."""
TRIALS_EVERY = 3
"""Rounds: most of the time goes to what is compared."""
KV_BYTES = 512 << 20
NUM_HALVINGS = 10
NUM_FORESEEN = 4
"""Chunks that are simulated to find a rate."""
IDLE_S = 2.0


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m bench planner_accuracy", description=__doc__)
    parser.add_argument("--profile", type=Path, help="of the demo model with 1 thread (measured)")
    parser.add_argument("--topology", default="1E 1P 1D", help="workers (1E 1P 1D)")
    parser.add_argument("--cores", type=int, help="of this machine, for everything (all)")
    parser.add_argument("--rounds", type=int, default=10, help="chunks of each rate (10)")
    parser.add_argument(
        "--chunk-s", type=float, default=5.0, help="seconds of a chunk, and of a trial's load (5)"
    )
    parser.add_argument("--singles", type=int, default=4, help="of each kind, in a trial (4)")
    parser.add_argument("--seed", type=int, default=0, help="of the requests (0)")
    parser.add_argument("--max-foreign", type=float, default=0.1, help="others' CPU share (0.1)")
    parser.add_argument("--quiet-wait-s", type=float, default=30.0, help="patience for quiet (30)")
    parser.add_argument("--keep", type=Path, help="write what was measured to this file")
    parser.add_argument("--replay", type=Path, help="judge what such a file holds, serve nothing")
    options = parser.parse_args()
    if options.cores is not None and not 0 < options.cores <= len(own_cores()):
        parser.error(f"--cores = {options.cores}: should be 1 to {len(own_cores())}")
    for name in ("rounds", "chunk_s", "singles"):
        if getattr(options, name) <= 0:
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"{flag} = {getattr(options, name)}: should be above 0")
    if options.replay is None:
        recording = measure(options)
    else:
        try:
            recording = Recording.read(options.replay)
        except SettingsError as error:
            parser.error(str(error))
    if options.keep is not None:
        recording.write(options.keep)
    judge(recording)


def measure(options: argparse.Namespace) -> Recording:
    """Trials, some rounds with a chunk of each rate, trials, and so on."""
    if options.cores is not None:
        os.sched_setaffinity(0, own_cores()[: options.cores])  # children inherit it
    quiet = partial(ForeignLoad().wait_until_quiet, options.max_foreign, options.quiet_wait_s)
    quiet()
    model = read_profile(options.profile)
    cores = len(own_cores())
    limits = Limits(num_blocks=KV_BYTES // (16 * model.kv_bytes_per_token))
    speed = measure_full_speed(cores)
    cluster = Cluster(options.topology, limits, model.links or Links(), cores, speed)
    os.environ["TRIPTYCH_KV_BYTES"] = str(KV_BYTES)
    arguments = ["--model", str(model_dir()), "--served-name", MODEL, "--threads", "1"]
    with (
        running_server([*arguments, "--topology", options.topology]) as url,
        speed_probe() as probe,
    ):
        maker = RequestMaker(options.seed)
        trials = Trials(url, maker, options.singles, options.chunk_s, measure_idle(), probe)
        trials.singles()  # warms up
        quiet()
        alone = [each for _ in range(NUM_ALONE) for each in trials.singles()]
        slo = limits_of(alone)
        trials = replace(trials, load_rates=load_rates(alone, cores))
        sets = [trials.all()]
        fitted = calibrated(cluster, model, sets)
        rates = [rate_for(fitted, maker, slo, target, options.chunk_s) for target in TARGETS]
        print(f"rates: {', '.join(f'{each:.2f}' for each in rates)} requests per second")
        rounds = []
        for number in track(range(1, options.rounds + 1), "serving"):
            quiet()
            rounds.append([serve(url, maker, probe, rate, options.chunk_s) for rate in rates])
            if number % TRIALS_EVERY == 0:
                sets.append(trials.all())
    return Recording(cluster, model, slo, sets, rounds)


def serve(
    url: str, maker: RequestMaker, probe: SpeedProbe, rate_per_s: float, chunk_s: float
) -> Chunk:
    """New requests at this rate."""
    load = maker.load(num_requests(rate_per_s, chunk_s), rate_per_s)
    foreign, started_s = ForeignLoad(), time.perf_counter()
    served = send(url, load)
    paces = probe.paces(started_s, time.perf_counter())
    share = foreign.share()
    time.sleep(SPANS_WAIT_S)
    arrivals = [each.arrival for each in load]
    return Chunk(rate_per_s, arrivals, with_spans(url, served), paces, share)


def read_profile(path: Path | None) -> PerformanceModel:
    """From the file, or measured now."""
    if path is not None:
        return PerformanceModel.from_json(path.read_text(encoding="utf-8"), str(path))
    with tempfile.TemporaryDirectory() as folder:
        settings = ProfileSettings(
            out=Path(folder) / "profile.json", compute=ComputeSettings(threads=1)
        )
        return profile(settings, Console())


def measure_idle() -> CpuSeconds:
    """In each second without requests."""
    cpu = OwnCpu()
    time.sleep(IDLE_S)
    return CpuSeconds().plus(cpu.seconds(), 1.0 / IDLE_S)


def rate_for(
    fitted: Calibrated, maker: RequestMaker, slo: Slo, target: float, chunk_s: float
) -> float:
    """The rate at which the simulator expects this share of good requests."""
    low, high = 0.1, 100.0
    requests = [maker.load(num_requests(high, chunk_s), 1.0) for _ in range(NUM_FORESEEN)]
    foreseen = [[each.arrival for each in load] for load in requests]
    for _ in range(NUM_HALVINGS):
        middle = (low * high) ** 0.5
        chunks = [each[: num_requests(middle, chunk_s)] for each in foreseen]
        done = [
            each
            for chunk in chunks
            for each in simulated_chunk(fitted, at_rate(chunk, middle / rate_of(chunk)))
        ]
        low, high = (middle, high) if share_of(done, slo) >= target else (low, middle)
    return low


if __name__ == "__main__":
    main()
