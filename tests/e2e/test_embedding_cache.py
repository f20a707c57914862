"""Over HTTP, JetStream and UCX: a picture that many ask about is encoded once; a request's pictures
are spread over the encoders."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from bench.client import chat_body
from tests.support.cluster import Cluster, running_cluster
from tests.support.demo_engine import plates

NUM_REQUESTS = 50
NUM_ENCODERS = 2
ENCODED = "triptych_embeddings_encoded_total"

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("cluster"), encoders=NUM_ENCODERS) as cluster:
        yield cluster


def ask(client: httpx.Client, cluster: Cluster, pictures: list[bytes], text: str) -> list[int]:
    body = chat_body(
        cluster.model,
        pictures,
        text,
        temperature=0,
        max_tokens=6,
        ignore_eos=True,
        return_token_ids=True,
    )
    response = client.post(f"{cluster.url}/v1/chat/completions", json=body)
    assert response.status_code == 200, f"{response.text}\n{cluster.logs()}"
    token_ids: list[int] = response.json()["choices"][0]["token_ids"]
    return token_ids


def encoded(cluster: Cluster) -> list[float]:
    return [worker.metric(ENCODED) for worker in cluster.workers("encoder")]


def test_fifty_concurrent_requests_about_one_picture_are_one_run_of_a_tower(
    cluster: Cluster,
) -> None:
    before = sum(encoded(cluster))
    pictures = plates(1, 1)
    with (
        httpx.Client(timeout=120.0, limits=httpx.Limits(max_connections=NUM_REQUESTS)) as client,
        ThreadPoolExecutor(NUM_REQUESTS) as pool,
    ):
        answers = list(
            pool.map(
                lambda _: ask(client, cluster, pictures, "What is on it?"), range(NUM_REQUESTS)
            )
        )
    assert sum(encoded(cluster)) == before + 1
    assert all(answer == answers[0] for answer in answers)


def test_the_pictures_of_one_request_are_spread_over_all_encoders(cluster: Cluster) -> None:
    before = encoded(cluster)
    with httpx.Client(timeout=120.0) as client:
        ask(client, cluster, plates(2, 8), "What do they say?")
    shares = [now - was for now, was in zip(encoded(cluster), before, strict=True)]
    assert sum(shares) == 8
    assert min(shares) >= 2, shares
