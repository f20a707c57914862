"""The planner's service sees a stage overloaded and switches real workers, under load."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path

import httpx
import pytest

from bench.prompts import PromptMaker
from services.launcher.ports import free_port
from services.local_engine import LocalEngine
from shared.messages.descriptor import SamplingParams
from tests.support.cluster import Cluster
from tests.support.load import assert_settled, check, roles, switch, under_load, until
from tests.support.mixed import Mixed

pytestmark = pytest.mark.timeout(240)

HOLD_S, COOLDOWN_S = 0.5, 2.0
LOOK_S = 0.02
REQUESTS = [
    Mixed((), f"hello {number}", SamplingParams(temperature=0.0, max_tokens=120 + 20 * number))
    for number in range(10)
]
"""Long answers to short prompts: only decoders are busy."""


@dataclass
class Watcher:
    """Who left its role, when that began at the latest, and when it took tasks in the new one at
    the earliest, in that order: between two looks lies as much as a loaded gateway takes."""

    cluster: Cluster
    home: dict[str, list[str]]
    began_s: dict[str, float] = field(default_factory=dict)
    ended_s: dict[str, float] = field(default_factory=dict)
    now_in: dict[str, list[str]] = field(default_factory=dict)
    last_look_s: float = field(default_factory=time.monotonic)

    def look(self) -> None:
        asked_s = time.monotonic()
        shown = roles(self.cluster)
        answered_s = time.monotonic()
        for name, (stages, is_ready) in shown.items():
            if not is_ready or stages != self.home[name]:
                self.began_s.setdefault(name, answered_s)
            if is_ready and stages != self.home[name]:
                self.ended_s.setdefault(name, self.last_look_s)
                self.now_in[name] = stages
        self.last_look_s = asked_s


@contextmanager
def watched(cluster: Cluster) -> Iterator[Watcher]:
    """Looks until the end of the block."""
    watcher = Watcher(cluster, {name: stages for name, (stages, _) in roles(cluster).items()})
    over = threading.Event()

    def look() -> None:
        while not over.wait(LOOK_S):
            watcher.look()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield watcher
    finally:
        over.set()
        thread.join()


@contextmanager
def planner(cluster: Cluster, folder: Path, **switches: float) -> Iterator[str]:
    """`triptych planner` as a process; yields the address of its metrics."""
    port = free_port()
    command = [sys.executable, "-m", "services.cli", "planner"]
    command += ["--nats-url", cluster.nats_url, "--served-name", cluster.model]
    command += ["--nats-ack-wait-s", "2", "--registration-ttl-s", "3", "--interval-s", "0.1"]
    command += ["--targets-decode-depth", "1", "--metrics-port", str(port)]
    for name, value in switches.items():
        command += [f"--switches-{name.replace('_', '-')}", str(value)]
    with (folder / f"planner-{port}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}/metrics"
    finally:
        process.terminate()
        process.wait(20)


def num_done(url: str) -> float:
    """Switches that the planner made for decode; 0 while it starts."""
    try:
        text = httpx.get(url, trust_env=False).text
    except httpx.ConnectError:
        return 0.0
    name = 'triptych_planner_switches_total{outcome="done",stage="decode"}'
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


def test_overloaded_decoders_get_help_and_no_more_than_allowed(
    cluster: Cluster, engine: LocalEngine, prompts: PromptMaker, tmp_path: Path
) -> None:
    started_s = time.monotonic()
    with under_load(cluster, repeat(REQUESTS)) as load:
        with (
            watched(cluster) as seen,
            planner(
                cluster, tmp_path, hold_s=HOLD_S, cooldown_s=COOLDOWN_S, gain=0.9, max_switches=2
            ) as url,
        ):
            until(lambda: len(seen.ended_s) == 2)
            until(lambda: num_done(url) == 2)
        first, second = seen.began_s
        assert seen.now_in == {first: ["decode"], second: ["decode"]}
        assert {first.split("-")[0], second.split("-")[0]} == {"encoder", "prefill"}
        assert seen.began_s[first] - started_s >= HOLD_S
        assert seen.began_s[second] - seen.ended_s[first] >= COOLDOWN_S
        assert httpx.get(f"{cluster.url}/ready", trust_env=False).status_code == 200

        for name in (first, second):
            assert switch(cluster, name, seen.home[name][0]).status_code == 200
        with (
            watched(cluster) as seen,
            planner(cluster, tmp_path, hold_s=0.1, cooldown_s=0.1, gain=0.9, max_switches=1) as url,
        ):
            until(lambda: num_done(url) == 1)
            time.sleep(1.5)  # in which another one would be worth it
            assert num_done(url) == 1
        assert len(seen.began_s) == 1
    check(load.answers, engine, prompts, cluster)
    assert_settled(cluster)
