"""Workers are killed while they work; every request still ends right, or in a typed error."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from bench.client import chat_body
from bench.prompts import PromptMaker
from services.local_engine import LocalEngine
from shared.messages.descriptor import SamplingParams
from shared.model.kernels.choice import has_compiled_kernels
from tests.chaos.conftest import BUS, FAST, LIVES
from tests.support.cluster import Cluster, running_cluster, sse_events
from tests.support.load import assert_settled, busiest, check, kill_at_work, under_load, until
from tests.support.mixed import mixed_rounds

pytestmark = pytest.mark.timeout(240)

NUM_REQUESTS = 16
NUM_TOKENS = 700


@pytest.mark.skipif(not has_compiled_kernels(), reason="--deterministic needs numba and AVX2")
def test_a_killed_decoder_changes_no_answer(
    cluster: Cluster, engine: LocalEngine, prompts: PromptMaker
) -> None:
    """The worker dies in the middle of a seeded answer; the client sees each token once.

    In the usual kernels recomputed keys and values move the cumulative probabilities by up to 5e-7
    to 1.4e-6, and a draw of so many may well fall that close to the border between two tokens.
    """
    # Hot: otherwise it would end its answer, again and again, instead of going on in words.
    sampling = SamplingParams(temperature=2.0, seed=3, max_tokens=NUM_TOKENS)
    body = chat_body(
        cluster.model, [], "hello", temperature=2.0, seed=3, max_tokens=NUM_TOKENS, ignore_eos=True
    )
    text, finish = "", None
    killed = False
    with httpx.stream(
        "POST",
        f"{cluster.url}/v1/chat/completions",
        json={**body, "stream": True},
        timeout=120.0,
        trust_env=False,
    ) as response:
        for event in sse_events(response.iter_lines()):
            assert "error" not in event, event
            (choice,) = event["choices"]
            text += choice["delta"].get("content") or ""
            finish = choice["finish_reason"] or finish
            if len(text) > 200 and not killed:
                busiest(cluster, "decode").kill()
                killed = True
    assert killed
    assert finish == "length"
    expected = list(engine.generate(prompts.request([], "hello", sampling), []))
    assert text == prompts.tokenizer.decode(expected)
    assert_settled(cluster)


@pytest.mark.parametrize("service", ["encoder", "prefill", "decode"])
def test_a_kill_under_load_loses_no_request(
    service: str, cluster: Cluster, engine: LocalEngine, prompts: PromptMaker
) -> None:
    with under_load(cluster, mixed_rounds(NUM_REQUESTS, seed=31 + len(service))) as load:
        kill_at_work(cluster, service)
    check(load.answers, engine, prompts, cluster)
    assert_settled(cluster)


def test_a_killed_worker_of_several_stages_loses_and_changes_nothing(
    tmp_path: Path, usual_engine: LocalEngine, prompts: PromptMaker
) -> None:
    """Its answers have no decode task of their own: the prefill tasks stand for them."""
    flags = {"worker": FAST, "gateway": [*BUS, *LIVES]}
    with running_cluster(tmp_path, topology="2EPD 2PD", flags=flags) as cluster:
        with under_load(cluster, mixed_rounds(NUM_REQUESTS, seed=37)) as load:
            for number in (0, 2):  # one that hosts all three stages, one that hosts two
                victim = cluster.processes[f"worker-{number}"]
                until(lambda victim=victim: victim.metric("triptych_num_requests_running"))
                victim.kill()
        check(load.answers, usual_engine, prompts, cluster)
        assert_settled(cluster)


def test_without_a_decoder_requests_are_refused_and_then_served_again(cluster: Cluster) -> None:
    for worker in cluster.workers("decode"):
        worker.kill()
    body = chat_body(cluster.model, [], "hello", max_tokens=4)
    until(lambda: post(cluster, body).status_code == 503)
    refused = post(cluster, body)
    assert refused.headers["retry-after"]
    assert "decode" in refused.json()["error"]["message"]
    assert "decode" in httpx.get(f"{cluster.url}/ready", trust_env=False).text
    cluster.restart("decode-0")
    until(lambda: post(cluster, body).status_code == 200)
    assert post(cluster, body).json()["choices"]


def post(cluster: Cluster, body: dict) -> httpx.Response:
    url = f"{cluster.url}/v1/chat/completions"
    return httpx.post(url, json=body, timeout=30.0, trust_env=False)
