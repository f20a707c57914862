"""Whichever stages share a process, the tokens are those of one process, and nothing is left held.

Real processes over HTTP, JetStream and UCX; `test_pipeline` does the same with more requests where
every stage is a process of its own.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.prompts import PromptMaker
from services.local_engine import LocalEngine
from tests.support.cluster import running_cluster
from tests.support.load import ask_all, assert_settled
from tests.support.mixed import Mixed, mixed_requests, tokens_of

NUM_REQUESTS = 24
CONCURRENCY = 8
SETTLED_S = 10.0

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def requests() -> list[Mixed]:
    return list(mixed_requests(NUM_REQUESTS, seed=41))


@pytest.fixture(scope="module")
def expected(requests: list[Mixed], engine: LocalEngine, prompts: PromptMaker) -> list[list[int]]:
    """One process, one request at a time."""
    return [tokens_of(request, engine, prompts) for request in requests]


@pytest.mark.parametrize("topology", ["EP-D", "ED-P", "E-PD", "EPD", "1EPD 1E 1PD 1D"])
def test_the_tokens_are_those_of_one_process(
    topology: str, tmp_path: Path, requests: list[Mixed], expected: list[list[int]]
) -> None:
    # So few slots that some sequences are queued although their process decodes as well.
    flags = {"worker": ["--max-batch", "3"]}
    with running_cluster(tmp_path, topology=topology, flags=flags) as cluster:
        answers = ask_all(cluster, requests, CONCURRENCY)
        for number, (answer, tokens) in enumerate(zip(answers, expected, strict=True)):
            assert answer == tokens, f"request {number}: {requests[number].question!r}"
        assert_settled(cluster, SETTLED_S)
        if topology == "EPD":
            (worker,) = cluster.workers("worker")
            moved = "triptych_transfer_bytes_total{direction=%s}"
            assert worker.metrics()[moved % "local"] > 0  # the embeddings
            assert worker.metrics()[moved % "sent"] == worker.metrics()[moved % "received"] == 0
