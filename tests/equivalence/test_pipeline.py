"""The distributed pipeline gives the tokens of one process, and of transformers.

Mixed requests go over HTTP, JetStream and UCX through separate processes, many at a time, so that
they meet in ever different batches. Their token ids must equal those of the same engine called
directly, one request at a time, and, for greedy requests, those of transformers' `generate`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from bench.prompts import PromptMaker
from services.local_engine import LocalEngine
from services.prefill.pieces import PiecePlan
from shared.demo import model_dir
from shared.messages.work import FIRST_TOKEN_BYTES
from shared.modelspec import ModelSpec
from shared.runtime.host import ModelFolder
from tests.support.cluster import Cluster, running_cluster
from tests.support.exact_reference import greedy_tokens
from tests.support.load import ask_all
from tests.support.mixed import Mixed, mixed_requests, tokens_of

NUM_REQUESTS = 200
CONCURRENCY = 12

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def requests() -> list[Mixed]:
    return list(mixed_requests(NUM_REQUESTS, seed=20))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder: Path = tmp_path_factory.mktemp("cluster")
    with running_cluster(folder) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def answers(cluster: Cluster, requests: list[Mixed]) -> list[list[int]]:
    """Every request's token ids through the pipeline."""
    return ask_all(cluster, requests, CONCURRENCY)


def test_the_pipeline_equals_one_process(
    answers: list[list[int]], requests: list[Mixed], engine: LocalEngine, prompts: PromptMaker
) -> None:
    for number, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        expected = tokens_of(request, engine, prompts)
        assert answer == expected, f"request {number}: {request.question!r} {request.sampling}"


def test_greedy_requests_equal_transformers(
    answers: list[list[int]], requests: list[Mixed]
) -> None:
    reference = Reference()
    greedy = [(r, a) for r, a in zip(requests, answers, strict=True) if r.is_greedy]
    assert len(greedy) > NUM_REQUESTS // 4
    for request, answer in greedy:
        assert answer == reference.generate(request), request.question


def test_every_tensor_moved_over_ucx(
    cluster: Cluster, answers: list[list[int]], requests: list[Mixed]
) -> None:
    """Sent equals received: the embedding of every picture once, and the KV of all requests; where
    that travels early, the first token is behind it."""
    spec = ModelSpec.load(model_dir())
    prompts = PromptMaker(model_dir())
    geometry = ModelFolder(model_dir(), spec, spec.dtype, "cpu").geometry(16)
    plan = PiecePlan("layer-wise", geometry)
    embedding_bytes: dict[str, int] = {}
    kv_bytes = 0
    for request in requests:
        made = prompts.request(request.pictures, request.question, request.sampling)
        for item in made.media:
            embedding_bytes[item.content_key] = 4 * spec.text.hidden_size * item.num_tokens
        num_tokens = len(made.prompt_token_ids)
        kv_bytes += geometry.bytes_per_token * num_tokens
        if plan.is_divided(num_tokens) and request.sampling.max_tokens > 1:
            kv_bytes += FIRST_TOKEN_BYTES
    (encoder,), (prefill,), (decode,) = map(cluster.workers, ("encoder", "prefill", "decode"))
    sent, received = (
        f"triptych_transfer_bytes_total{{direction={d}}}" for d in ("sent", "received")
    )
    assert encoder.metrics()[sent] == prefill.metrics()[received] == sum(embedding_bytes.values())
    assert prefill.metrics()[sent] == decode.metrics()[received] == kv_bytes


class Reference:
    """transformers, one request at a time."""

    def __init__(self) -> None:
        from transformers import (
            AutoImageProcessor,
            AutoTokenizer,
            Qwen2_5_VLForConditionalGeneration,
        )

        self._tokenizer = AutoTokenizer.from_pretrained(model_dir())
        self._processor = AutoImageProcessor.from_pretrained(model_dir(), backend="pil")
        self._model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            model_dir(), dtype=torch.float32
        ).eval()

    def generate(self, request: Mixed) -> list[int]:
        """Greedy token ids, as many as the request asks for."""
        inputs = self._inputs(request)
        return greedy_tokens(self._model, inputs, request.sampling.max_tokens)

    def _inputs(self, request: Mixed) -> dict[str, torch.Tensor]:
        parts = [{"type": "image"}] * len(request.pictures)
        content = [*parts, {"type": "text", "text": request.question}]
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        inputs: dict[str, torch.Tensor] = {}
        if request.pictures:
            pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in request.pictures]
            features = self._processor(images=pictures, return_tensors="pt")
            inputs = {name: features[name] for name in ("pixel_values", "image_grid_thw")}
            for grid in inputs["image_grid_thw"]:
                num_tokens = int(grid.prod()) // self._processor.merge_size**2
                text = text.replace("<|image_pad|>", "<|placeholder|>" * num_tokens, 1)
            text = text.replace("<|placeholder|>", "<|image_pad|>")
        inputs["input_ids"] = self._tokenizer(text, return_tensors="pt").input_ids
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["mm_token_type_ids"] = (
            inputs["input_ids"] == self._model.config.image_token_id
        ).int()
        return inputs
