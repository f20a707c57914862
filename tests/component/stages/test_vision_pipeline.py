"""The three stages with families whose pictures are tiles, marks or several features a row."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
import transformers

from bench.prompts import PromptMaker
from services.local_engine import LocalEngine
from shared.messages.descriptor import SamplingParams
from shared.modelspec import ModelSpec
from shared.runtime.host import ModelFolder
from tests.support.exact_reference import greedy_tokens
from tests.support.models import quiet
from tests.support.stages import GATEWAY, MODEL, running_pipeline
from tests.support.vision_folders import (
    build_vision_folder,
    hf_inputs,
    hf_processor,
    picture_file,
)

JOBS: dict[str, list[bytes]] = {
    "one": [picture_file(21, 37)],
    "three": [picture_file(70, 9, 1), picture_file(12, 12, 2), picture_file(50, 40, 3)],
    "text": [],
}
NUM_TOKENS = 12


# One for each kind: several features a row, line breaks, one size, marks around, runs apart.
@pytest.mark.parametrize("name", ["qwen3_vl", "llava_next", "gemma3", "internvl", "smolvlm"])
async def test_tokens_equal_transformers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ModelSpec.load(build_vision_folder(name, tmp_path))
    folder = ModelFolder(tmp_path, spec, spec.dtype, "cpu")
    prompts, engine = PromptMaker(tmp_path), LocalEngine(folder)
    requests = {}
    for job, pictures in JOBS.items():
        sampling = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS)
        made = prompts.request(pictures, "what?", sampling)
        requests[job] = made.model_copy(
            update={"request_id": job, "gateway": GATEWAY, "model": MODEL}
        )
    async with running_pipeline(folder) as pipeline:
        await asyncio.gather(*(pipeline.submit(requests[job], JOBS[job]) for job in JOBS))
        answers = {job: await pipeline.tokens_of(job) for job in JOBS}
        await pipeline.settled()
    expected = {job: list(engine.generate(requests[job], JOBS[job])) for job in JOBS}
    assert answers == expected
    assert expected == of_transformers(tmp_path, monkeypatch)


def of_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    processor = hf_processor(folder, monkeypatch)
    with quiet():
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32
        ).eval()
    answers = {}
    for job, pictures in JOBS.items():
        inputs = hf_inputs(processor, [*pictures, "what?"])
        answers[job] = greedy_tokens(model, inputs, NUM_TOKENS)
    return answers
