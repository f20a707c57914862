"""What clients get from a cluster with two workers of each stage."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from openai import OpenAI

from bench.accuracy import png
from bench.client import chat_body
from bench.prompts import PromptMaker
from examples.plates.draw import draw
from examples.plates.specs import plate_spec
from services.local_engine import LocalEngine
from tests.support.cluster import Cluster
from tests.support.mixed import Mixed, mixed_requests

pytestmark = pytest.mark.timeout(300)
ORDINALS = ("first", "second", "third")


def plates(numbers: list[int]) -> list[bytes]:
    rng = random.Random(str(numbers))
    return [png(draw(plate_spec(rng, number))) for number in numbers]


def ask(client: httpx.Client, body: dict[str, Any]) -> httpx.Response:
    return client.post("/v1/chat/completions", json=body)


def test_every_answer_belongs_to_its_picture(client: httpx.Client, cluster: Cluster) -> None:
    """Two requests hold the same three pictures in opposite order, at the same time."""
    numbers = [38, 4, 71]
    forward = plates(numbers)
    wanted, bodies = [], []
    for pictures, order in ((forward, numbers), (forward[::-1], numbers[::-1])):
        for place, ordinal in enumerate(ORDINALS):
            question = f"What is the number in the {ordinal} picture?"
            bodies.append(chat_body(cluster.model, pictures, question, temperature=0))
            wanted.append(str(order[place]))
    with ThreadPoolExecutor(len(bodies)) as pool:
        responses = list(pool.map(lambda body: ask(client, body), bodies))
    answers = [response.json()["choices"][0]["message"]["content"] for response in responses]
    assert answers == wanted


def test_a_burst_of_requests_all_end_right(
    client: httpx.Client, cluster: Cluster, engine: LocalEngine, prompts: PromptMaker
) -> None:
    """200 at once with 2 to 4 pictures and landing memory for fewer than two of the largest."""
    requests = [r for r in mixed_requests(400, seed=5) if len(r.pictures) >= 2][:200]
    assert len(requests) == 200
    limits = httpx.Limits(max_connections=200)
    with (
        httpx.Client(base_url=cluster.url, timeout=200.0, limits=limits) as many,
        ThreadPoolExecutor(200) as pool,
    ):
        responses = list(pool.map(lambda r: ask(many, r.body(cluster.model)), requests))
    ended = [_outcome(response) for response in responses]
    assert all(ended), "a request ended neither in an answer nor in a typed error"
    right = [
        answer == _expected(engine, prompts, request)
        for request, answer in zip(requests, ended, strict=True)
        if isinstance(answer, list)
    ]
    assert all(right)
    # All of them are within the gateway's default limit of requests in flight.
    assert len(right) == 200, f"{200 - len(right)} of 200 were refused"
    assert_nothing_left(cluster)


def _outcome(response: httpx.Response) -> list[int] | str:
    """The token ids of an answer, or the type of an error."""
    body = response.json()
    if response.status_code == 200:
        (choice,) = body["choices"]
        assert choice["finish_reason"] == "length"
        token_ids: list[int] = choice["token_ids"]
        return token_ids
    assert response.status_code in (429, 503, 504), body
    assert response.headers.get("retry-after") or response.status_code == 504
    kind: str = body["error"]["type"]
    return kind


def _expected(engine: LocalEngine, prompts: PromptMaker, request: Mixed) -> list[int]:
    descriptor = prompts.request(request.pictures, request.question, request.sampling)
    return list(engine.generate(descriptor, request.pictures))


def assert_nothing_left(cluster: Cluster, timeout_s: float = 10.0) -> None:
    """Every lease is released and every KV block free."""
    give_up_at = time.monotonic() + timeout_s
    while True:
        left = {
            worker.name: (worker.metric("triptych_leases_open"), _kv_usage(worker.name, worker))
            for service in ("encoder", "prefill", "decode")
            for worker in cluster.workers(service)
        }
        if not any(any(values) for values in left.values()):
            return
        assert time.monotonic() < give_up_at, f"leases and KV left: {left}"
        time.sleep(0.1)


def _kv_usage(name: str, worker: Any) -> float:
    usage: float = worker.metric("triptych_kv_cache_usage_perc")
    return usage


def test_the_openai_client_streams(cluster: Cluster) -> None:
    openai = OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)
    body = chat_body(cluster.model, plates([57]), "What number is on the plate?")
    stream = openai.chat.completions.create(
        **body, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "57"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens >= 1
    assert [m.id for m in openai.models.list().data] == [cluster.model]
    openai.close()


def test_a_text_request_never_touches_an_encoder(client: httpx.Client, cluster: Cluster) -> None:
    def encoded() -> float:
        return sum(w.metric("triptych_encoder_batch_items_sum") for w in cluster.workers("encoder"))

    before = encoded()
    response = ask(client, chat_body(cluster.model, [], "hello", temperature=0))
    assert response.status_code == 200
    assert encoded() == before


def test_a_client_that_leaves_stops_the_work(client: httpx.Client, cluster: Cluster) -> None:
    body = chat_body(cluster.model, [], "hello", temperature=0, max_tokens=2000, ignore_eos=True)
    with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        lines = response.iter_lines()
        while '"content": "' not in (line := next(lines)) and '"content":"' not in line:
            pass
    generated = _generated(cluster)
    assert_nothing_left(cluster)
    assert _generated(cluster) - generated < 1000, "decoding went on after the client had left"


def _generated(cluster: Cluster) -> float:
    return sum(w.metric("triptych_generation_tokens_total") for w in cluster.workers("decode"))
