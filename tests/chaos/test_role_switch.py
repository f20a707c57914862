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


def check(answers: list[httpx.Response], requests: list[Mixed], engine: LocalEngine) -> None:
    prompts = PromptMaker(model_dir())
    for request, response in zip(requests, answers, strict=True):
        assert response.status_code == 200, response.text
        descriptor = prompts.request(request.pictures, request.question, request.sampling)
        expected = list(engine.generate(descriptor, request.pictures))
        assert response.json()["choices"][0]["token_ids"] == expected


def ask_all(cluster: Cluster, requests: list[Mixed], started: threading.Event) -> list:
    url = f"{cluster.url}/v1/chat/completions"

    def ask(request: Mixed) -> httpx.Response:
        response = client.post(url, json=request.body(cluster.model))
        started.set()
        return response

    with httpx.Client(timeout=150.0) as client, ThreadPoolExecutor(8) as pool:
        return list(pool.map(ask, requests))


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
    requests, started = list(mixed_requests(60, seed=41)), threading.Event()
    with running_cluster(tmp_path, topology=topology, flags=FLAGS) as cluster:
        pids = {p.name: p.popen.pid for p in cluster.processes.values()}
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(ask_all, cluster, requests, started)
            assert started.wait(60)
            for role in (away, home):
                response = switch(cluster, worker, role)
                assert response.status_code == 200, f"{response.text}\n{cluster.logs()}"
                assert roles(cluster)[worker] == ([role], True)
                assert httpx.get(f"{cluster.url}/ready").status_code == 200
            assert not asking.done(), "the load was over before the switches were"
            answers = asking.result()
        check(answers, requests, engine)
        assert {p.name: p.popen.pid for p in cluster.processes.values()} == pids
        assert all(p.popen.poll() is None for p in cluster.processes.values())
        give_up_at = time.monotonic() + 10
        while (left := left_over(cluster)) and time.monotonic() < give_up_at:
            time.sleep(0.1)
        assert not left


def test_a_worker_killed_in_the_middle_of_a_switch_loses_no_request(
    tmp_path: Path, engine: LocalEngine
) -> None:
    requests, started = list(mixed_requests(40, seed=43)), threading.Event()
    with running_cluster(tmp_path, topology="1E 2P 2D", flags=FLAGS) as cluster:
        with ThreadPoolExecutor(2) as pool:
            asking = pool.submit(ask_all, cluster, requests, started)
            assert started.wait(60)
            switching = pool.submit(switch, cluster, "decode-1", "encode")
            give_up_at = time.monotonic() + 30
            while roles(cluster)["decode-1"][1] and time.monotonic() < give_up_at:
                time.sleep(0.01)
            cluster.processes["decode-1"].kill()
            answers, refused = asking.result(), switching.result()
        check(answers, requests, engine)
        assert refused.status_code == 504, refused.text
        assert refused.json()["error"]["code"] == "no_answer"
