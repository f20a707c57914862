"""Workers are killed while they work; every request still ends right, or in a typed error."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from bench.client import chat_body
from bench.prompts import PromptMaker
from services.local_engine import LocalEngine
from shared.demo import model_dir
from shared.messages.descriptor import SamplingParams
from shared.model.kernels.choice import has_compiled_kernels
from shared.modelspec import ModelSpec
from shared.runtime.host import ModelFolder
from tests.support.cluster import Cluster, Process, running_cluster, sse_events
from tests.support.mixed import Mixed, mixed_requests

pytestmark = pytest.mark.timeout(300)

# Short lives, so that a death is noticed within seconds and not within the default of six.
FAST = ["--registration-ttl-s", "2", "--pull-timeout-s", "3"]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    flags = dict.fromkeys(("encoder", "prefill", "decode"), FAST)
    flags |= {"gateway": ["--registration-ttl-s", "2"]}
    with running_cluster(tmp_path, encoders=2, prefills=2, decodes=2, flags=flags) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def engine() -> LocalEngine:
    spec = ModelSpec.load(model_dir())
    return LocalEngine(ModelFolder(model_dir(), spec, spec.dtype, "cpu"))


@pytest.fixture(scope="module")
def prompts() -> PromptMaker:
    return PromptMaker(model_dir())


@pytest.fixture
def deterministic_cluster(tmp_path: Path) -> Iterator[Cluster]:
    exact = [*FAST, "--deterministic"]
    flags = {"encoder": FAST, "prefill": exact, "decode": exact}
    flags |= {"gateway": ["--registration-ttl-s", "2"]}
    with running_cluster(tmp_path, decodes=2, flags=flags) as cluster:
        yield cluster


@pytest.mark.skipif(not has_compiled_kernels(), reason="--deterministic needs numba and AVX2")
def test_a_killed_decoder_changes_no_answer(
    deterministic_cluster: Cluster, prompts: PromptMaker
) -> None:
    """The worker dies in the middle of a seeded answer; the client sees each token once.

    In the usual kernels draw 1188 falls within 2.4e-8 of the border between two tokens, and
    recomputed keys and values move the cumulative probabilities by up to 5e-7 to 1.4e-6 there, so
    the workers compute deterministically.
    """
    cluster = deterministic_cluster
    spec = ModelSpec.load(model_dir())
    engine = LocalEngine(ModelFolder(model_dir(), spec, spec.dtype, "cpu", deterministic=True))
    sampling = SamplingParams(temperature=1.0, seed=3, max_tokens=1500)
    body = chat_body(
        cluster.model, [], "hello", temperature=1.0, seed=3, max_tokens=1500, ignore_eos=True
    )
    text, finish = "", None
    killed = False
    with httpx.stream(
        "POST",
        f"{cluster.url}/v1/chat/completions",
        json={**body, "stream": True},
        timeout=120.0,
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
    request = prompts.request([], "hello", sampling)
    assert text == text_of(prompts, list(engine.generate(request, [])))


def busiest(cluster: Cluster, service: str) -> Process:
    """The worker with the most tasks at work."""
    workers = cluster.workers(service)
    return max(workers, key=lambda w: w.metric("triptych_num_requests_running"))


def text_of(prompts: PromptMaker, token_ids: list[int]) -> str:
    return prompts.tokenizer.decode(token_ids)


@pytest.mark.parametrize("service", ["encoder", "prefill", "decode"])
def test_a_kill_under_load_loses_no_request(
    service: str, cluster: Cluster, engine: LocalEngine, prompts: PromptMaker
) -> None:
    requests = list(mixed_requests(40, seed=31))
    with kill_after(1.0, cluster.workers(service)[0].kill):
        answers = ask_all(cluster, requests)
    for request, response in zip(requests, answers, strict=True):
        assert response.status_code == 200, f"{response.text}\n{cluster.logs()}"
        descriptor = prompts.request(request.pictures, request.question, request.sampling)
        expected = list(engine.generate(descriptor, request.pictures))
        assert response.json()["choices"][0]["token_ids"] == expected


@pytest.mark.timeout(600)
@pytest.mark.parametrize("topology", ["2EPD", "1E 2PD"])
def test_a_killed_worker_of_several_stages_loses_and_changes_nothing(
    topology: str, tmp_path: Path, engine: LocalEngine, prompts: PromptMaker
) -> None:
    """Its answers have no decode task of their own: the prefill tasks stand for them."""
    requests = list(mixed_requests(40, seed=37))
    services = ("encoder", "worker")
    flags = {**dict.fromkeys(services, FAST), "gateway": ["--registration-ttl-s", "2"]}
    with running_cluster(tmp_path, topology=topology, flags=flags) as cluster:
        with kill_after(1.0, lambda: busiest(cluster, "worker").kill()):
            answers = ask_all(cluster, requests)
        for request, response in zip(requests, answers, strict=True):
            assert response.status_code == 200, f"{response.text}\n{cluster.logs()}"
            descriptor = prompts.request(request.pictures, request.question, request.sampling)
            expected = list(engine.generate(descriptor, request.pictures))
            assert response.json()["choices"][0]["token_ids"] == expected


def ask_all(cluster: Cluster, requests: list[Mixed]) -> list[httpx.Response]:
    url = f"{cluster.url}/v1/chat/completions"

    def ask(request: Mixed) -> httpx.Response:
        time.sleep(0.05)  # spreads the load over the kill
        return client.post(url, json=request.body(cluster.model))

    with httpx.Client(timeout=150.0) as client, ThreadPoolExecutor(8) as pool:
        return list(pool.map(ask, requests))


class kill_after:  # noqa: N801 - reads like a statement
    """Within the block, call `kill` once after some seconds; fail if it never came to it."""

    def __init__(self, after_s: float, kill: Callable[[], None]) -> None:
        self._timer = threading.Timer(after_s, kill)

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *exc_info: object) -> None:
        assert not self._timer.is_alive(), "the load was over before the worker was killed"
        self._timer.join()


def test_without_a_decoder_requests_are_refused_and_then_served_again(
    cluster: Cluster, tmp_path: Path
) -> None:
    for worker in cluster.workers("decode"):
        worker.kill()
    body = chat_body(cluster.model, [], "hello", max_tokens=4)
    refused = eventually(lambda: post(cluster, body), 503)
    assert refused.headers["retry-after"]
    assert "decode" in refused.json()["error"]["message"]
    assert "decode" in httpx.get(f"{cluster.url}/ready").text
    cluster.restart("decode-0")
    assert eventually(lambda: post(cluster, body), 200).json()["choices"]


def post(cluster: Cluster, body: dict) -> httpx.Response:
    return httpx.post(f"{cluster.url}/v1/chat/completions", json=body, timeout=30.0)


def eventually(call: Callable[[], httpx.Response], status: int) -> httpx.Response:
    give_up_at = time.monotonic() + 30
    while (response := call()).status_code != status:
        assert time.monotonic() < give_up_at, response.text
        time.sleep(0.2)
    return response
