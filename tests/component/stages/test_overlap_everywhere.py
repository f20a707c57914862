"""Overlap on and off in every topology and for every kind of picture: one process' tokens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.prompts import PromptMaker
from services.decode.settings import DecodeSettings
from services.encoder.executor import EncodeExecutor
from services.encoder.settings import EncoderSettings
from services.local_engine import LocalEngine
from services.prefill.settings import PrefillSettings
from shared.messages.descriptor import RequestDescriptor
from shared.modelspec import ModelSpec
from shared.runtime.host import ModelFolder
from shared.runtime.settings import ModelSettings
from tests.support.demo_engine import plates
from tests.support.parts import Parts, ask, pictures_of
from tests.support.stages import MODEL, Pipeline, running_pipeline
from tests.support.vision_folders import build_vision_folder, picture_file

TOPOLOGIES = ("E-P-D", "EP-D", "ED-P", "E-PD", "EPD", "1EPD 1E 1PD 1D")


@pytest.fixture
def slow_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every picture takes its time, so prefill has some."""
    run = EncodeExecutor.run

    def slowly(executor: EncodeExecutor, pixels: Sequence[Any]) -> Any:
        time.sleep(0.05 * len(pixels))
        return run(executor, pixels)

    monkeypatch.setattr(EncodeExecutor, "run", slowly)


async def answers_of(
    pipeline: Pipeline, requests: Sequence[RequestDescriptor], jobs: Sequence[Parts]
) -> tuple[list[list[int]], float]:
    """The tokens of each, and how many tokens of them all were computed early."""
    await asyncio.gather(
        *(
            pipeline.submit(request, pictures_of(parts))
            for request, parts in zip(requests, jobs, strict=True)
        )
    )
    answers = [await pipeline.tokens_of(request.request_id) for request in requests]
    await pipeline.settled()
    registries = {id(w.registry): w.registry for w in pipeline.workers.values()}
    early = [r.get_sample_value("triptych_prompt_tokens_early_total") for r in registries.values()]
    return answers, sum(filter(None, early))


@pytest.mark.usefixtures("slow_encoders")
@pytest.mark.parametrize("topology", TOPOLOGIES)
async def test_every_topology_gives_the_tokens_of_one_process(
    topology: str, folder: ModelFolder, engine: LocalEngine, prompts: PromptMaker
) -> None:
    jobs: list[Parts] = []
    for n in range(6):
        first, *rest = plates(n, 1 + n % 3)
        jobs.append([f"{n} What is this? " * (3 * n + 2), first, "And here?", *rest])
    sampling = [{"temperature": 0.8, "seed": 5} if n == 3 else {} for n in range(len(jobs))]
    requests = [
        ask(prompts, f"r{n}", parts, **options)
        for n, (parts, options) in enumerate(zip(jobs, sampling, strict=True))
    ]
    answers: dict[bool, list[list[int]]] = {}
    for overlap in (True, False):
        changes = {"min_early_tokens": 16, "overlap_encode": overlap, "max_batch_patches": 1}
        model = ModelSettings(served_name=MODEL)
        async with running_pipeline(
            folder,
            topology=topology,
            encoder=EncoderSettings(model=model, drain_s=1.0, max_batch_patches=1),
            prefill=PrefillSettings(
                model=model, drain_s=1.0, min_early_tokens=16, overlap_encode=overlap
            ),
            hosts=changes,
        ) as pipeline:
            answers[overlap], num_early = await answers_of(pipeline, requests, jobs)
            if "1PD" not in topology:  # there one of two prefill workers is not looked at
                shares_device = "EP" in topology  # with the tower
                assert (num_early > 0) == (overlap and not shares_device)
    expected = [
        list(engine.generate(request, pictures_of(parts)))
        for request, parts in zip(requests, jobs, strict=True)
    ]
    assert answers[True] == answers[False] == expected


# Several features a row, line breaks, pictures that must be whole, marks around, runs apart.
@pytest.mark.usefixtures("slow_encoders")
@pytest.mark.parametrize("chunk_tokens", [0, 8])
@pytest.mark.parametrize("name", ["qwen3_vl", "llava_next", "gemma3", "internvl", "smolvlm"])
async def test_every_kind_of_picture(name: str, chunk_tokens: int, tmp_path: Path) -> None:
    spec = ModelSpec.load(build_vision_folder(name, tmp_path))
    folder = ModelFolder(tmp_path, spec, spec.dtype, "cpu")
    prompts, engine = PromptMaker(tmp_path), LocalEngine(folder)
    one, two, three = picture_file(70, 9, 1), picture_file(12, 12, 2), picture_file(50, 40, 3)
    jobs: list[Parts] = [
        ["what is here? " * 3, one, two, "and there?", three],
        [one, "what? " * 5, three, two],
        ["what is here? " * 3, one, two, "or here?", three],
    ]
    requests = [ask(prompts, f"r{n}", parts) for n, parts in enumerate(jobs)]
    every = {"model": ModelSettings(served_name=MODEL), "drain_s": 1.0, "block_size": 4}
    async with running_pipeline(
        folder,
        encoder=EncoderSettings(**every, max_batch_patches=1),
        prefill=PrefillSettings(**every, min_early_tokens=4, chunk_tokens=chunk_tokens),
        decode=DecodeSettings(**every),
    ) as pipeline:
        answers, num_early = await answers_of(pipeline, requests[:2], jobs[:2])
        warm, _ = await answers_of(pipeline, requests[2:], jobs[2:])
    assert num_early > 0
    assert [*answers, *warm] == [
        list(engine.generate(request, pictures_of(parts)))
        for request, parts in zip(requests, jobs, strict=True)
    ]
