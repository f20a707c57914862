"""A whole Triptych with delayed workers: real nats-server, real gateway, real processes.

In: a topology and a performance model. Out: the gateway's URL, once every worker has said that it
is ready. Everything ends with the block.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from bench.delayed.profiles import SCALED_SETTINGS
from services.launcher import nats_server
from services.launcher.ports import free_port
from services.planner.perf_model import PerformanceModel
from shared.demo import model_dir
from shared.runtime.lifecycle import DIE_WITH_PARENT
from shared.runtime.topology import parse_topology

MODEL = "delayed"
ENCODER_HELD = 2
"""One picture in the tower and one on its way: a busy encoder keeps no more from an idle one."""
MAX_PICTURE_PIXELS = 4096 * 4096
START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class DelayedCluster:
    """Where it listens, and the log of its workers."""

    url: str
    nats_url: str
    workers_log: Path

    def lines(self) -> list[dict[str, object]]:
        """What the workers have logged so far."""
        found = []
        for line in self.workers_log.read_text(encoding="utf-8").splitlines():
            if line.startswith("{") and line.endswith("}"):
                found.append(json.loads(line))
        return found


@contextmanager
def delayed_cluster(
    topology: str,
    timing: PerformanceModel,
    *,
    encoder_held: int = ENCODER_HELD,
    settings: Mapping[str, str] | None = None,
    write: Callable[[Path], Path] | None = None,
) -> Iterator[DelayedCluster]:
    """Start it, yield it, stop it. `settings` are `TRIPTYCH_*` variables of all its processes;
    `write` makes the model's folder, `write_model` unless given."""
    num_workers = len(parse_topology(topology))
    with ExitStack() as scope:
        folder = Path(scope.enter_context(tempfile.TemporaryDirectory()))
        model = (write or write_model)(folder / "model")
        profile = folder / "profile.json"
        profile.write_text(timing.model_dump_json(), encoding="utf-8")
        nats = nats_server.prepare(folder)
        environment = {**_base_environment(), **SCALED_SETTINGS, **(settings or {})}
        scope.enter_context(_process(nats.spec.command, environment, folder / "nats.log"))
        asyncio.run(nats_server.wait_until_listening(nats.port))
        common = (
            *("--nats-url", nats.url, "--model", str(model)),
            *("--served-name", MODEL, "--log-format", "json"),
        )
        python = (sys.executable, "-m")
        workers = (
            *(*python, "bench.delayed", "--workers", topology, "--profile", str(profile)),
            *("--encoder-held", str(encoder_held)),
        )
        log = folder / "workers.log"
        running = scope.enter_context(_process((*workers, *common), environment, log))
        port = free_port()
        gateway = (*python, "services.gateway", *common, "--port", str(port))
        scope.enter_context(_process(gateway, environment, folder / "gateway.log"))
        cluster = DelayedCluster(f"http://127.0.0.1:{port}", nats.url, log)
        _wait_until_ready(cluster, num_workers, running)
        yield cluster


def write_model(folder: Path) -> Path:
    """The demo model without its weights, and with no picture made smaller."""
    folder.mkdir()
    for file in model_dir().iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    path = folder / "preprocessor_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["max_pixels"] = config["size"]["longest_edge"] = MAX_PICTURE_PIXELS
    path.write_text(json.dumps(config), encoding="utf-8")
    return folder


def _base_environment() -> dict[str, str]:
    return {
        **os.environ,
        DIE_WITH_PARENT: str(os.getpid()),
        "OMP_NUM_THREADS": "1",
        # As the launcher sets it: shared memory leaves no name behind.
        "UCX_POSIX_USE_PROC_LINK": "y",
    }


@contextmanager
def _process(
    command: Sequence[str], environment: Mapping[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as output:
        popen = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        yield popen
    finally:
        popen.terminate()
        try:
            popen.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            popen.kill()
            popen.wait()


def _wait_until_ready(
    cluster: DelayedCluster, num_workers: int, running: subprocess.Popen[bytes]
) -> None:
    give_up_at = time.monotonic() + START_TIMEOUT_S
    while not _is_ready(cluster, num_workers):
        if running.poll() is not None or time.monotonic() > give_up_at:
            tail = cluster.workers_log.read_text(encoding="utf-8")[-3000:]
            raise RuntimeError(f"{num_workers} delayed workers did not get ready:\n{tail}")
        time.sleep(0.3)


def _is_ready(cluster: DelayedCluster, num_workers: int) -> bool:
    if sum(line.get("event") == "ready" for line in cluster.lines()) < num_workers:
        return False
    try:
        return httpx.get(f"{cluster.url}/ready", timeout=5.0).status_code == 200
    except httpx.HTTPError:
        return False
