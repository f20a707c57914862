"""However a prompt's KV travels over UCX from one process to another, the tokens are the same."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from bench.client import chat_body
from bench.prompts import PromptMaker
from services.local_engine import LocalEngine
from shared.demo import model_dir
from shared.messages.descriptor import SamplingParams
from shared.modelspec import ModelSpec
from shared.runtime.host import ModelFolder
from tests.support.cluster import Cluster, running_cluster, start_worker
from tests.support.load import assert_settled, roles, until

pytestmark = pytest.mark.timeout(240)

CHUNK_TOKENS = 512
NUM_WORDS = 250
NUM_TOKENS = 6
MAX_PROMPTS = 15
MODES = ("whole", "per-chunk", "layer-wise")


def test_every_way_of_transfer_gives_the_tokens_of_one_process(tmp_path: Path) -> None:
    """One prefill worker of each way; whoever is idle takes the next prompt."""
    spec = ModelSpec.load(model_dir())
    engine = LocalEngine(ModelFolder(model_dir(), spec, spec.dtype, "cpu"))
    prompts = PromptMaker(model_dir())
    flags = {"prefill": flags_of(MODES[0])}
    with running_cluster(tmp_path, topology="1ED 1P", flags=flags) as cluster:
        base = ["--nats-url", cluster.nats_url, "--model", str(model_dir())]
        base += ["--served-name", cluster.model]
        for number, mode in enumerate(MODES[1:], start=1):
            start_worker(cluster, tmp_path, f"prefill-{number}", [*base, *flags_of(mode)])
        until(lambda: sum(ready for _, ready in roles(cluster).values()) == 1 + len(MODES))
        sent: dict[str, list[float]] = {mode: [] for mode in MODES}
        for number in range(MAX_PROMPTS):
            words = " ".join(f"{number}n{word}" for word in range(NUM_WORDS))
            before = num_sent(cluster)
            sampling = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS)
            expected = list(engine.generate(prompts.request([], words, sampling), []))
            assert ask(cluster, words) == expected
            for mode, count in num_sent(cluster).items():
                if count > before[mode]:
                    sent[mode].append(count - before[mode])
            if all(sent.values()):
                break
        assert_settled(cluster)
    assert all(sent.values()), f"some worker never had its turn: {sent}"
    # All at once, and the first token with the task; else pieces, and the first token behind them.
    assert set(sent["whole"]) == {1.0}
    assert min(sent["per-chunk"]) >= 3
    assert min(sent["layer-wise"]) > max(sent["per-chunk"])


def flags_of(mode: str) -> list[str]:
    return ["--kv-transfer", mode, "--chunk-tokens", str(CHUNK_TOKENS)]


def num_sent(cluster: Cluster) -> dict[str, float]:
    """Segments that each prefill worker has sent so far."""
    name = "triptych_transfers_total{direction=sent}"
    workers = cluster.workers("prefill")
    return {mode: worker.metrics()[name] for mode, worker in zip(MODES, workers, strict=True)}


def ask(cluster: Cluster, words: str) -> list[int]:
    options = {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    body = chat_body(cluster.model, [], words, return_token_ids=True, **options)
    url = f"{cluster.url}/v1/chat/completions"
    response = httpx.post(url, json=body, timeout=60.0, trust_env=False)
    assert response.status_code == 200, f"{response.text}\n{cluster.logs()}"
    token_ids: list[int] = response.json()["choices"][0]["token_ids"]
    return token_ids
