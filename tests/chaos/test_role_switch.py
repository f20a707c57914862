"""Roles change over real NATS and UCX while requests run: no answer is lost or changed."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from bench.prompts import PromptMaker
from services.local_engine import LocalEngine
from shared.demo import model_dir
from shared.modelspec import ModelSpec
from shared.runtime.host import ModelFolder
from tests.support.cluster import Cluster, running_cluster
from tests.support.mixed import Mixed, mixed_requests

pytestmark = pytest.mark.timeout(600)

FINISH = ["--switch-finish-s", "0.2"]
FLAGS = dict.fromkeys(("encoder", "prefill", "decode"), FINISH)


@pytest.fixture(scope="module")
def engine() -> LocalEngine:
    spec = ModelSpec.load(model_dir())
    return LocalEngine(ModelFolder(model_dir(), spec, spec.dtype, "cpu"))


def check(answers: list[tuple[Mixed, httpx.Response]], engine: LocalEngine) -> None:
    prompts, expected = PromptMaker(model_dir()), dict[Mixed, list[int]]()
    for request, response in answers:
        assert response.status_code == 200, response.text
        if request not in expected:
            descriptor = prompts.request(request.pictures, request.question, request.sampling)
            expected[request] = list(engine.generate(descriptor, request.pictures))
        assert response.json()["choices"][0]["token_ids"] == expected[request]


class Load:
    """Eight clients that ask `requests` again and again until `end`, each at least once."""

    def __init__(self, cluster: Cluster, requests: list[Mixed]) -> None:
        self.started, self._over = threading.Event(), threading.Event()
        self._cluster, self._requests = cluster, requests

    def end(self) -> None:
        self._over.set()

    def run(self) -> list[tuple[Mixed, httpx.Response]]:
        url = f"{self._cluster.url}/v1/chat/completions"
        answers: list[tuple[Mixed, httpx.Response]] = []

        def ask(request: Mixed) -> tuple[Mixed, httpx.Response]:
            response = client.post(url, json=request.body(self._cluster.model))
            self.started.set()
            return request, response

        with httpx.Client(timeout=150.0) as client, ThreadPoolExecutor(8) as pool:
            while not answers or not self._over.is_set():
                answers += pool.map(ask, self._requests)
        return answers


def switch(cluster: Cluster, worker: str, role: str) -> httpx.Response:
    url = f"{cluster.url}/v1/roles/{worker}"
    return httpx.post(url, json={"role": role}, timeout=60.0)


def roles(cluster: Cluster) -> dict[str, tuple[list[str], bool]]:
    workers = httpx.get(f"{cluster.url}/v1/roles").json()["workers"]
    return {each["worker"]: (each["stages"], each["ready"]) for each in workers}


def left_over(cluster: Cluster) -> dict[str, float]:
    names = (
        "triptych_leases_open",
        "triptych_kv_cache_usage_perc",
        "triptych_num_requests_running",
    )
    found = {
        f"{process.name} {name}": process.metric(name)
        for process in cluster.processes.values()
        if process.metrics_url
        for name in names
    }
    return {name: value for name, value in found.items() if value}


@pytest.mark.parametrize(
    ("topology", "worker", "away", "home"),
    [
        ("1E 2P 2D", "decode-1", "prefill", "decode"),
        ("2E 1P 1D", "encoder-1", "decode", "encode"),
    ],
)
def test_a_worker_changes_its_role_and_comes_back_under_load(
    topology: str, worker: str, away: str, home: str, tmp_path: Path, engine: LocalEngine
) -> None:
    with running_cluster(tmp_path, topology=topology, flags=FLAGS) as cluster:
        load = Load(cluster, list(mixed_requests(40, seed=41)))
        pids = {p.name: p.popen.pid for p in cluster.processes.values()}
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(load.run)
            assert load.started.wait(60)
            try:
                for role in (away, home):
                    response = switch(cluster, worker, role)
                    assert response.status_code == 200, f"{response.text}\n{cluster.logs()}"
                    assert roles(cluster)[worker] == ([role], True)
                    assert httpx.get(f"{cluster.url}/ready").status_code == 200
            finally:
                load.end()
            answers = asking.result()
        check(answers, engine)
        assert {p.name: p.popen.pid for p in cluster.processes.values()} == pids
        assert all(p.popen.poll() is None for p in cluster.processes.values())
        give_up_at = time.monotonic() + 10
        while (left := left_over(cluster)) and time.monotonic() < give_up_at:
            time.sleep(0.1)
        assert not left


def test_a_worker_killed_in_the_middle_of_a_switch_loses_no_request(
    tmp_path: Path, engine: LocalEngine
) -> None:
    with running_cluster(tmp_path, topology="1E 2P 2D", flags=FLAGS) as cluster:
        load = Load(cluster, list(mixed_requests(40, seed=43)))
        with ThreadPoolExecutor(2) as pool:
            asking = pool.submit(load.run)
            assert load.started.wait(60)
            switching = pool.submit(switch, cluster, "decode-1", "encode")
            give_up_at = time.monotonic() + 30
            while roles(cluster)["decode-1"][1] and time.monotonic() < give_up_at:
                time.sleep(0.01)
            cluster.processes["decode-1"].kill()
            refused = switching.result()
            load.end()
            answers = asking.result()
        check(answers, engine)
        assert refused.status_code == 504, refused.text
        assert refused.json()["error"]["code"] == "no_answer"
