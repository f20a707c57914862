"""A worker dies while a prompt's KV is half way over UCX; the answer is right, nothing is held."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from bench.client import chat_body
from bench.prompts import PromptMaker
from services.local_engine import LocalEngine
from shared.cache.geometry import KvGeometry
from shared.demo import model_dir
from shared.messages.descriptor import SamplingParams
from shared.modelspec import ModelSpec
from tests.support.cluster import Cluster, Process
from tests.support.load import assert_settled, until

pytestmark = pytest.mark.timeout(240)

NUM_WORDS = 480
NUM_TOKENS = 12
RECEIVED = "triptych_transfer_bytes_total{direction=received}"


@pytest.mark.parametrize("victim", ["prefill", "decode"])
def test_a_worker_killed_while_kv_travels_changes_no_answer(
    victim: str, cluster: Cluster, engine: LocalEngine, prompts: PromptMaker
) -> None:
    words = " ".join(f"{victim}{number}" for number in range(NUM_WORDS))
    request = prompts.request([], words, SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS))
    expected = list(engine.generate(request, []))
    before = {each.name: received(each) for each in cluster.workers("decode")}
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask, cluster, words)
        until(lambda: receiver(cluster, before) is not None or asking.done())
        decoder = receiver(cluster, before)
        assert decoder is not None, asking.result().text
        (prefill,) = (each for each in cluster.workers("prefill") if running(each))
        num_bytes = received(decoder) - before[decoder.name]
        {"prefill": prefill, "decode": decoder}[victim].kill()
        killed_s = time.monotonic()
        answer = asking.result()
    assert 0 < num_bytes < request.num_tokens * kv_bytes_per_token(), "it was not half way"
    assert answer.status_code == 200, f"{answer.text}\n{cluster.logs()}"
    assert answer.json()["choices"][0]["token_ids"] == expected
    assert time.monotonic() - killed_s < 30, "it took more than a death's usual time to be noticed"
    assert_settled(cluster)


def kv_bytes_per_token() -> int:
    text = ModelSpec.load(model_dir()).text
    return KvGeometry.of(text, block_size=16, dtype="float32").bytes_per_token


def ask(cluster: Cluster, words: str) -> httpx.Response:
    body = chat_body(
        cluster.model,
        [],
        words,
        temperature=0,
        max_tokens=NUM_TOKENS,
        ignore_eos=True,
        return_token_ids=True,
    )
    url = f"{cluster.url}/v1/chat/completions"
    return httpx.post(url, json=body, timeout=120.0, trust_env=False)


def received(worker: Process) -> float:
    """Bytes of tensors that came over UCX."""
    return worker.metrics().get(RECEIVED, 0.0)


def running(worker: Process) -> float:
    return worker.metric("triptych_num_requests_running")


def receiver(cluster: Cluster, before: dict[str, float]) -> Process | None:
    """The decoder that has some of the prompt's KV."""
    for each in cluster.workers("decode"):
        if received(each) > before[each.name]:
            return each
    return None
