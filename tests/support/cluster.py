"""A whole Triptych on this machine: a real nats-server, real worker processes, a real gateway.

Every process is started as a user would start it; tests look at it from outside only: HTTP, the
`/metrics` of each worker, and what the operating system says of the processes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from services.launcher.ports import free_port
from shared.demo import model_dir
from shared.messages.control import Role
from shared.runtime.topology import parse_topology
from tests.support.nats_server import NatsServer

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 30.0
SERVICES = {Role.ENCODE: "encoder", Role.PREFILL: "prefill", Role.DECODE: "decode"}


@dataclass
class Process:
    """One service process and where to look at it."""

    name: str
    popen: subprocess.Popen[bytes]
    command: list[str]
    log: Path
    metrics_url: str | None = None

    def metrics(self) -> dict[str, float]:
        """Every sample as `name{label=value,...}` -> value."""
        assert self.metrics_url is not None, f"{self.name} has no metrics endpoint"
        text = httpx.get(self.metrics_url, timeout=5.0).text
        samples = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
                samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
        return samples

    def metric(self, name: str) -> float:
        """The sum over all label sets of one metric; 0 if it was never touched."""
        found = self.metrics().items()
        return sum(value for key, value in found if key.split("{")[0] == name)

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        self.popen.send_signal(signal.SIGKILL)
        self.popen.wait(10)


@dataclass
class Cluster:
    """The running processes by name (`encoder-0`, `decode-1`, `worker-0`, `gateway-0`)."""

    url: str
    nats_url: str
    model: str
    processes: dict[str, Process] = field(default_factory=dict)

    def workers(self, service: str) -> list[Process]:
        """All workers of one service."""
        return [p for name, p in self.processes.items() if name.startswith(f"{service}-")]

    def restart(self, name: str) -> None:
        """Start a killed process again, with the very same command line."""
        process = self.processes[name]
        with process.log.open("ab") as out:
            process.popen = subprocess.Popen(process.command, stdout=out, stderr=out)

    def logs(self) -> str:
        """The end of every process' log, for a failing test to show."""
        return "\n".join(
            f"--- {p.name} (exit {p.popen.poll()})\n{p.log.read_text()[-3000:]}"
            for p in self.processes.values()
        )


@contextmanager
def running_cluster(
    folder: Path,
    *,
    encoders: int = 1,
    prefills: int = 1,
    decodes: int = 1,
    topology: str = "",
    model: Path | None = None,
    flags: Mapping[str, Sequence[str]] | None = None,
) -> Iterator[Cluster]:
    """Start everything, wait until the gateway is ready, stop everything afterwards.

    `topology` says which stages share a process, instead of the counts; a process of several is a
    `worker`. `flags` adds arguments per service (`{"prefill": ["--landing-bytes", "1MiB"]}`).
    """
    workers = parse_topology(topology or f"{encoders}E-{prefills}P-{decodes}D")
    port = free_port()
    with _nats(folder / "nats") as server:
        cluster = Cluster(f"http://127.0.0.1:{port}", server.url, "test-model")
        base = ["--nats-url", server.url, "--model", str(model or model_dir())]
        base += ["--served-name", cluster.model]
        try:
            for stages in workers:
                service = SERVICES[stages[0]] if len(stages) == 1 else "worker"
                extra = ["--stages", ",".join(stages)] if len(stages) > 1 else []
                extra += (flags or {}).get(service, ())
                name = f"{service}-{len(cluster.workers(service))}"
                start_worker(cluster, folder, name, [*base, *extra])
            gateway = [*base, "--port", str(port), *(flags or {}).get("gateway", ())]
            _start(cluster, folder, "gateway-0", "gateway", gateway)
            _wait_ready(cluster)
            yield cluster
        finally:
            _stop(cluster)


@contextmanager
def _nats(folder: Path) -> Iterator[NatsServer]:
    folder.mkdir()
    server = NatsServer(folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def start_worker(cluster: Cluster, folder: Path, name: str, arguments: Sequence[str]) -> Process:
    """Start one more worker (or one that was killed, under its old name)."""
    metrics_port = free_port()
    arguments = [*arguments, "--metrics-port", str(metrics_port), "--threads", "1"]
    process = _start(cluster, folder, name, name.rsplit("-", 1)[0], arguments)
    process.metrics_url = f"http://127.0.0.1:{metrics_port}/metrics"
    return process


def _start(
    cluster: Cluster, folder: Path, name: str, service: str, arguments: Sequence[str]
) -> Process:
    log = folder / f"{name}.log"
    command = [sys.executable, "-m", f"services.{service}", "--name", name, *arguments]
    environment = os.environ | {
        "TRIPTYCH_DIE_WITH_PARENT": "1",
        "OMP_NUM_THREADS": "1",
        # As the launcher sets it: shared memory segments leave no name behind, however they end.
        "UCX_POSIX_USE_PROC_LINK": "y",
    }
    with log.open("ab") as out:
        popen = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    process = Process(name, popen, command, log)
    cluster.processes[name] = process
    return process


def _wait_ready(cluster: Cluster) -> None:
    give_up_at = time.monotonic() + START_TIMEOUT_S
    answer = "no answer"
    while time.monotonic() < give_up_at:
        dead = [p.name for p in cluster.processes.values() if p.popen.poll() is not None]
        if dead:
            raise RuntimeError(f"{dead} died at the start\n{cluster.logs()}")
        try:
            response = httpx.get(f"{cluster.url}/ready", timeout=2.0)
            if response.status_code == 200:
                return
            answer = response.text
        except httpx.TransportError as error:
            answer = str(error)
        time.sleep(0.1)
    raise RuntimeError(f"not ready after {START_TIMEOUT_S} s: {answer}\n{cluster.logs()}")


def _stop(cluster: Cluster) -> None:
    for process in cluster.processes.values():
        if process.popen.poll() is None:
            process.popen.terminate()
    give_up_at = time.monotonic() + STOP_TIMEOUT_S
    for process in cluster.processes.values():
        try:
            process.popen.wait(max(0.1, give_up_at - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.popen.kill()
            process.popen.wait(5)


def sse_events(lines: Iterator[str]) -> Iterator[dict[str, object]]:
    """The JSON of each `data:` line of a stream, up to `[DONE]`."""
    for line in lines:
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))
