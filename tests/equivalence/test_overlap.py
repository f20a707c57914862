"""A text in front of pictures, computed while they are encoded or afterwards: the same tokens.

Real processes over HTTP, JetStream and UCX, many requests at a time, each sent twice so that the
second one meets a warm cache.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench.prompts import PromptMaker
from services.local_engine import LocalEngine
from tests.support.cluster import running_cluster
from tests.support.load import ask_all
from tests.support.mixed import Mixed, mixed_requests, tokens_of

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
def expected(requests: list[Mixed], engine: LocalEngine, prompts: PromptMaker) -> list[list[int]]:
    """One process, one request at a time."""
    return [tokens_of(request, engine, prompts) for request in requests]


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
            answers = ask_all(cluster, requests, CONCURRENCY)
            for number, (answer, tokens) in enumerate(zip(answers, expected, strict=True)):
                assert answer == tokens, f"{temperature} request {number}: {requests[number]}"
        (worker,) = cluster.workers("prefill")
        assert (worker.metric("triptych_prompt_tokens_early_total") > 0) == overlap
