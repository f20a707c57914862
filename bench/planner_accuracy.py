"""The simulator against the running system: the share of good requests at three rates.

Starts every service on the demo model. First single requests and a burst of several at once on the
idle system: what the profile does not hold (HTTP, tokenising, the client) is set so that these come
out right; the limits are multiples of what single requests took. Then, at each rate, the same
requests at the same times are sent over HTTP and simulated, on as many cores as there are. Every
prompt and picture is new, so that no cache answers. The compute is real: measured by `triptych
profile`, and done by the workers. Other load on the machine falsifies results: each part waits for
a quiet machine, and the share that others took meanwhile is printed. Prints the largest difference
in points last.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import httpx
from rich.console import Console
from rich.progress import track

from bench.client import stream
from bench.planner_requests import KINDS, MODEL, Request, RequestMaker
from bench.processes import ForeignLoad
from bench.server import running_server
from services.launcher.stack import num_cores
from services.planner.cluster import Cluster, Limits, Links
from services.planner.goodput import goodput, rate_of
from services.planner.perf_model import PerformanceModel
from services.planner.profiling.command import profile
from services.planner.profiling.settings import ProfileSettings
from services.planner.simulator import simulate
from services.planner.slo import Slo
from shared.demo import model_dir
from shared.runtime.settings import ComputeSettings

SHARES = (0.5, 0.85, 1.1)
"""Of the simulated goodput: few wait, many wait, too many come."""
MAX_CLIENTS = 128
BURST = 8
NUM_BURSTS = 5
NUM_ROUNDS = 12
"""Of setting the fixed times."""
KV_BYTES = 512 << 20


@dataclass(frozen=True)
class Outcome:
    """Seconds to the first token and for each after it; infinite where the request failed."""

    ttft_s: float
    tpot_s: float

    def is_good(self, slo: Slo) -> bool:
        """Whether both limits are kept."""
        return self.ttft_s <= slo.ttft_s and self.tpot_s <= slo.tpot_s


FAILED = Outcome(float("inf"), float("inf"))


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m bench planner_accuracy", description=__doc__)
    parser.add_argument("--profile", type=Path, help="of the demo model with 1 thread (measured)")
    parser.add_argument("--topology", default="1EPD", help="workers (1EPD)")
    parser.add_argument("--requests", type=int, default=200, help="at each rate (200)")
    parser.add_argument("--idle-requests", type=int, default=15, help="single, of each kind (15)")
    parser.add_argument("--seed", type=int, default=0, help="of the requests (0)")
    parser.add_argument("--max-foreign", type=float, default=0.1, help="others' CPU share (0.1)")
    parser.add_argument("--quiet-wait-s", type=float, default=60.0, help="patience for quiet (60)")
    options = parser.parse_args()
    quiet = partial(ForeignLoad().wait_until_quiet, options.max_foreign, options.quiet_wait_s)
    quiet()
    model = read_profile(options.profile)
    maker = RequestMaker(options.seed)
    limits = Limits(num_blocks=KV_BYTES // (16 * model.kv_bytes_per_token))
    cluster = Cluster(options.topology, limits, model.links or Links(), num_cores())
    os.environ["TRIPTYCH_KV_BYTES"] = str(KV_BYTES)
    arguments = ["--model", str(model_dir()), "--served-name", MODEL, "--threads", "1"]
    with (
        running_server([*arguments, "--topology", options.topology]) as url,
        httpx.Client(timeout=300.0, limits=httpx.Limits(max_connections=None)) as client,
    ):
        quiet()
        idle = measure_idle(client, url, maker, options.idle_requests)
        burst = measure_burst(client, url, maker)
        cluster, slo = calibrated(cluster, model, idle, burst)
        print(f"limits: TTFT {slo.ttft_s * 1e3:.0f} ms, TPOT {slo.tpot_s * 1e3:.1f} ms")
        print(f"links: {cluster.links}")
        load = maker.load(options.requests, 1.0)
        arrivals = [each.arrival for each in load]
        stretch = goodput(cluster, model, arrivals, slo) / rate_of(arrivals)
        differences = []
        for share in SHARES:
            load = maker.load(options.requests, stretch * share)
            quiet()
            differences.append(compare(client, url, cluster, model, slo, load))
    print(f"largest difference of attainment: {max(differences):.1f} points")


def read_profile(path: Path | None) -> PerformanceModel:
    """From the file, or measured now."""
    if path is not None:
        return PerformanceModel.from_json(path.read_text(encoding="utf-8"), str(path))
    with tempfile.TemporaryDirectory() as folder:
        settings = ProfileSettings(
            out=Path(folder) / "profile.json", compute=ComputeSettings(threads=1)
        )
        return profile(settings, Console())


def ask(client: httpx.Client, url: str, request: Request) -> Outcome:
    """One streamed answer."""
    try:
        timed = stream(client, url, request.body)
    except (RuntimeError, httpx.HTTPError):
        return FAILED
    return Outcome(timed.ttft_s, sum(timed.gaps_s) / max(1, timed.num_tokens - 1))


def measure_idle(
    client: httpx.Client, url: str, maker: RequestMaker, count: int
) -> dict[str, list[tuple[Request, Outcome]]]:
    """Single requests, one after the other; the first ones warm up and do not count."""
    found: dict[str, list[tuple[Request, Outcome]]] = {shape.kind: [] for shape in KINDS}
    for number in track(range(count + 3), "single requests"):
        for shape in KINDS:
            request = maker.make(shape, 0.0)
            outcome = ask(client, url, request)
            if number >= 3:
                found[shape.kind].append((request, outcome))
    return found


def measure_burst(
    client: httpx.Client, url: str, maker: RequestMaker
) -> list[tuple[list[Request], list[Outcome]]]:
    """Texts that come all at once."""
    bursts = [[maker.make(KINDS[0], 0.0) for _ in range(BURST)] for _ in range(NUM_BURSTS)]
    return [(requests, send(client, url, requests)) for requests in bursts]


def calibrated(
    cluster: Cluster,
    model: PerformanceModel,
    idle: dict[str, list[tuple[Request, Outcome]]],
    bursts: Sequence[tuple[list[Request], list[Outcome]]],
) -> tuple[Cluster, Slo]:
    """The cluster with its fixed times set by single requests and by bursts of them, and limits
    that suit it."""
    for _ in range(NUM_ROUNDS):  # each of the times has a part in what the others are set by
        links = cluster.links
        late_s = statistics.median(_burst_residual(cluster, model, *each) for each in bursts)
        links = replace(links, token_s=max(0.0, links.token_s + late_s / BURST / 2))
        text, image = (_residuals(cluster, model, idle[shape.kind]) for shape in KINDS)
        links = replace(links, step_s=max(0.0, links.step_s + text.tpot_s))
        links = replace(links, gateway_s=max(0.0, links.gateway_s + text.ttft_s))
        # A picture's file goes through the store twice.
        late_s = image.ttft_s - text.ttft_s
        links = replace(links, store_s=max(0.0, links.store_s + late_s / 2))
        cluster = replace(cluster, links=links)
    image_s = statistics.median(outcome.ttft_s for _, outcome in idle["image"])
    token_s = statistics.median(outcome.tpot_s for _, outcome in idle["text"])
    return cluster, Slo(4 * image_s, 3 * token_s)


def _burst_residual(
    cluster: Cluster,
    model: PerformanceModel,
    requests: Sequence[Request],
    outcomes: Sequence[Outcome],
) -> float:
    """Seconds per token, measured minus simulated."""
    done = simulate(cluster, model, [each.arrival for each in requests]).requests
    simulated = statistics.median(each.tpot_s or 0.0 for each in done)
    return statistics.median(outcome.tpot_s for outcome in outcomes) - simulated


def _residuals(
    cluster: Cluster, model: PerformanceModel, idle: Sequence[tuple[Request, Outcome]]
) -> Outcome:
    """Median of measured minus simulated, of single requests."""
    ttfts, tpots = [], []
    for request, outcome in idle:
        (alone,) = simulate(cluster, model, [request.arrival]).requests
        assert alone.ttft_s is not None
        assert alone.tpot_s is not None
        ttfts.append(outcome.ttft_s - alone.ttft_s)
        tpots.append(outcome.tpot_s - alone.tpot_s)
    return Outcome(statistics.median(ttfts), statistics.median(tpots))


def compare(
    client: httpx.Client,
    url: str,
    cluster: Cluster,
    model: PerformanceModel,
    slo: Slo,
    load: Sequence[Request],
) -> float:
    """Serve and simulate the same load; prints a line and returns the difference in points."""
    rate = rate_of([each.arrival for each in load])
    foreign = ForeignLoad()
    served = send(client, url, load)
    share = foreign.share()
    done = simulate(cluster, model, [each.arrival for each in load]).requests
    simulated = [Outcome(each.ttft_s or 0.0, each.tpot_s or 0.0) for each in done]
    real, told = (
        100 * statistics.mean(each.is_good(slo) for each in side) for side in (served, simulated)
    )
    medians = [
        f"{1e3 * statistics.median(getattr(each, field) for each in side):.0f}"
        for field in ("ttft_s", "tpot_s")
        for side in (served, simulated)
    ]
    print(
        f"{rate:6.2f}/s  attained: served {real:5.1f} %  simulated {told:5.1f} %  "
        f"median ms: TTFT {medians[0]} / {medians[1]}, TPOT {medians[2]} / {medians[3]}  "
        f"failed {sum(each is FAILED for each in served)}  others' CPU {share:.2f}",
        flush=True,
    )
    return abs(real - told)


def send(client: httpx.Client, url: str, load: Sequence[Request]) -> list[Outcome]:
    """Every request at its time, whether or not those before it have ended."""
    begin_s = time.perf_counter() + 0.2

    def one(request: Request) -> Outcome:
        threading.Event().wait(max(0.0, begin_s + request.arrival.arrival_s - time.perf_counter()))
        started_s = time.perf_counter()
        outcome = ask(client, url, request)
        # A client that was late must not make the server look early.
        late_s = max(0.0, started_s - begin_s - request.arrival.arrival_s)
        return replace(outcome, ttft_s=outcome.ttft_s + late_s) if outcome is not FAILED else FAILED

    with ThreadPoolExecutor(MAX_CLIENTS) as pool:
        return list(track(pool.map(one, load), "serving", total=len(load), transient=True))


if __name__ == "__main__":
    main()
