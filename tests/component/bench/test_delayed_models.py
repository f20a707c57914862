"""Delays in place of models: the stages run without weights, in the predicted time."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from bench.delayed.load import new_picture
from bench.delayed.models import delayed_models
from bench.delayed.profiles import PICTURE_PATCHES
from bench.delayed.workers import named
from bench.prompts import PromptMaker
from services.planner.perf_model import PerformanceModel, Samples
from shared.demo import model_dir
from shared.errors import ModelLoadError
from shared.messages.descriptor import SamplingParams
from shared.messages.events import TokenEvent
from shared.modelspec import ModelSpec
from shared.runtime.host import ModelFolder
from shared.runtime.topology import parse_topology
from tests.support.stages import GATEWAY, MODEL, running_pipeline

ENCODE_S, PREFILL_S, DECODE_S = 0.3, 0.2, 0.02
NUM_TOKENS = 6


def timing() -> PerformanceModel:
    """Times that depend on the number of patches, tokens and sequences only."""
    return PerformanceModel.of_samples(
        Samples(
            encode=[(n * PICTURE_PATCHES, n * ENCODE_S) for n in (1, 2, 3)],
            prefill=[([n], PREFILL_S) for n in (10, 100, 1000)],
            decode=[([100] * n, DECODE_S * n) for n in (1, 2, 8)],
        ),
        kv_bytes_per_token=1,
        embedding_bytes_per_patch=1.0,
    )


@pytest.fixture
def folder_without_weights(tmp_path: Path) -> ModelFolder:
    for file in model_dir().iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path)
    return ModelFolder(tmp_path, ModelSpec.load(tmp_path), "float32", "cpu")


@pytest.mark.parametrize("topology", ["1E 1P 1D", "1EPD"])
async def test_an_answer_takes_the_predicted_time(
    folder_without_weights: ModelFolder, topology: str
) -> None:
    import numpy as np

    pictures = [new_picture(np.random.default_rng(seed)) for seed in (1, 2)]
    sampling = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS)
    request = (
        PromptMaker(folder_without_weights.directory)
        .request(pictures, "what?", sampling)
        .model_copy(update={"gateway": GATEWAY, "model": MODEL})
    )
    with delayed_models(timing()):
        async with running_pipeline(folder_without_weights, topology=topology) as pipeline:
            started_s = time.perf_counter()
            await pipeline.submit(request, pictures)
            events = await pipeline.end_of(request.request_id)
            took_s = time.perf_counter() - started_s
            await pipeline.settled()
    tokens = [event.token_id for event in events if isinstance(event, TokenEvent)]
    assert tokens == [0] * NUM_TOKENS
    expected_s = 2 * ENCODE_S + PREFILL_S + (NUM_TOKENS - 1) * DECODE_S
    assert expected_s <= took_s < expected_s + 10.0  # never less; other load may add to it


async def test_without_the_delays_the_weights_are_missed(
    folder_without_weights: ModelFolder,
) -> None:
    with pytest.raises(ModelLoadError):
        async with running_pipeline(folder_without_weights):
            pass


def test_workers_are_named_as_the_launcher_names_them() -> None:
    names = [name for name, _ in named(parse_topology("2E 1P 1PD"))]
    assert names == ["encoder-0", "encoder-1", "prefill-0", "worker-0"]
