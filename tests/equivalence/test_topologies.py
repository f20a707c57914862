"""Whichever stages share a process, the tokens are those of one process, and nothing is left held.

Real processes over HTTP, JetStream and UCX; `test_pipeline` does the same with more requests where
every stage is a process of its own.
"""

from __future__ import annotations

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

NUM_REQUESTS = 24
CONCURRENCY = 8
SETTLED_S = 10.0

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def requests() -> list[Mixed]:
    return list(mixed_requests(NUM_REQUESTS, seed=41))


@pytest.fixture(scope="module")
def expected(requests: list[Mixed]) -> list[list[int]]:
    """One process, one request at a time."""
    spec = ModelSpec.load(model_dir())
    engine = LocalEngine(ModelFolder(model_dir(), spec, spec.dtype, "cpu"))
    prompts = PromptMaker(model_dir())
    return [
        list(engine.generate(prompts.request(r.pictures, r.question, r.sampling), r.pictures))
        for r in requests
    ]


@pytest.mark.parametrize("topology", ["EP-D", "ED-P", "E-PD", "EPD", "1EPD 1E 1PD 1D"])
def test_the_tokens_are_those_of_one_process(
    topology: str, tmp_path: Path, requests: list[Mixed], expected: list[list[int]]
) -> None:
    # So few slots that some sequences are queued although their process decodes as well.
    flags = {"worker": ["--max-batch", "3"]}
    with running_cluster(tmp_path, topology=topology, flags=flags) as cluster:
        answers = ask_all(cluster, requests)
        for number, (answer, tokens) in enumerate(zip(answers, expected, strict=True)):
            assert answer == tokens, f"request {number}: {requests[number].question!r}"
        assert_settled(cluster)
        if topology == "EPD":
            (worker,) = cluster.workers("worker")
            moved = "triptych_transfer_bytes_total{direction=%s}"
            assert worker.metrics()[moved % "local"] > 0  # the embeddings
            assert worker.metrics()[moved % "sent"] == worker.metrics()[moved % "received"] == 0


def ask_all(cluster: Cluster, requests: list[Mixed]) -> list[list[int]]:
    url = f"{cluster.url}/v1/chat/completions"

    def ask(request: Mixed) -> list[int]:
        response = client.post(url, json=request.body(cluster.model))
        assert response.status_code == 200, f"{response.text}\n{cluster.logs()}"
        token_ids: list[int] = response.json()["choices"][0]["token_ids"]
        return token_ids

    with httpx.Client(timeout=120.0) as client, ThreadPoolExecutor(CONCURRENCY) as pool:
        return list(pool.map(ask, requests))


def assert_settled(cluster: Cluster) -> None:
    """Every lease is released and every KV block is free, soon."""
    give_up_at = time.monotonic() + SETTLED_S
    while held := held_by(cluster):
        assert time.monotonic() < give_up_at, f"left over: {held}"
        time.sleep(0.2)


def held_by(cluster: Cluster) -> dict[str, float]:
    workers = [p for p in cluster.processes.values() if p.metrics_url is not None]
    return {
        f"{worker.name} {name}": value
        for worker in workers
        for name in ("triptych_leases_open", "triptych_kv_cache_usage_perc")
        if (value := worker.metric(name))
    }
