"""A text in front of pictures, computed while they are encoded or afterwards: the same tokens.

Real processes over HTTP, JetStream and UCX, many requests at a time, each sent twice so that the
second one meets a warm cache.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
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

NUM_REQUESTS = 16
CONCURRENCY = 8

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def requests() -> list[Mixed]:
    return [
        replace(made, preface=f"{n} Look at what comes next. " * (1 + n % 7))
        for n, made in enumerate(mixed_requests(NUM_REQUESTS, seed=21))
    ]


@pytest.fixture(scope="module")
def expected(requests: list[Mixed]) -> list[list[int]]:
    """One process, one request at a time."""
    spec = ModelSpec.load(model_dir())
    engine = LocalEngine(ModelFolder(model_dir(), spec, spec.dtype, "cpu"))
    prompts = PromptMaker(model_dir())
    return [
        list(
            engine.generate(
                prompts.request(r.pictures, r.question, r.sampling, preface=r.preface), r.pictures
            )
        )
        for r in requests
    ]


@pytest.mark.parametrize("overlap", [True, False])
def test_the_tokens_are_those_of_one_process(
    overlap: bool, tmp_path: Path, requests: list[Mixed], expected: list[list[int]]
) -> None:
    arguments = ["--overlap-encode" if overlap else "--no-overlap-encode"]
    arguments += ["--min-early-tokens", "16"]
    # One picture in the tower at a time, so that they land one by one.
    narrow = ["--max-batch-patches", "1"]
    flags = {"prefill": arguments, "encoder": narrow}
    with running_cluster(tmp_path, flags=flags) as cluster:
        for temperature in ("cold", "warm"):
            answers = ask_all(cluster, requests)
            for number, (answer, tokens) in enumerate(zip(answers, expected, strict=True)):
                assert answer == tokens, f"{temperature} request {number}: {requests[number]}"
        (worker,) = cluster.workers("prefill")
        assert (worker.metric("triptych_prompt_tokens_early_total") > 0) == overlap


def ask_all(cluster: Cluster, requests: list[Mixed]) -> list[list[int]]:
    url = f"{cluster.url}/v1/chat/completions"

    def ask(request: Mixed) -> list[int]:
        response = client.post(url, json=request.body(cluster.model))
        assert response.status_code == 200, f"{response.text}\n{cluster.logs()}"
        token_ids: list[int] = response.json()["choices"][0]["token_ids"]
        return token_ids

    with httpx.Client(timeout=120.0) as client, ThreadPoolExecutor(CONCURRENCY) as pool:
        return list(pool.map(ask, requests))
