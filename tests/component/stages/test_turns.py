"""Stages whose workers share cores: the same tokens, and steps with all that came before a turn."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from bench.prompts import PromptMaker
from services.decode.settings import DecodeSettings
from services.encoder.settings import EncoderSettings
from services.encoder.stage import EncodeStage
from services.local_engine import LocalEngine
from services.prefill.settings import PrefillSettings
from shared.messages.control import Role
from shared.messages.descriptor import SamplingParams
from shared.runtime.core_turns import CoreTurns
from shared.runtime.host import ModelFolder
from shared.runtime.settings import ComputeSettings, ModelSettings
from tests.support.demo_engine import plates
from tests.support.stages import GATEWAY, MODEL, Pipeline, running_pipeline


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    return tmp_path / "cores"


@asynccontextmanager
async def sharing(folder: ModelFolder, lock: Path) -> AsyncIterator[Pipeline]:
    common = {
        "model": ModelSettings(served_name=MODEL),
        "drain_s": 1.0,
        "core_lock": str(lock),
        "compute": ComputeSettings(threads=os.cpu_count() or 1),
    }
    async with running_pipeline(
        folder,
        encoder=EncoderSettings(**common),
        prefill=PrefillSettings(**common),
        decode=DecodeSettings(**common),
    ) as pipeline:
        yield pipeline


async def test_pictures_that_come_before_its_turn_are_one_step_of_the_encoder(
    folder: ModelFolder, prompts: PromptMaker, engine: LocalEngine, lock: Path
) -> None:
    pictures = plates(7, 3)
    requests = {}
    for number, picture in enumerate(pictures):
        made = prompts.request([picture], "What is this?", SamplingParams(temperature=0.0))
        name = f"r{number}"
        requests[name] = made.model_copy(
            update={"request_id": name, "gateway": GATEWAY, "model": MODEL}
        )
    async with sharing(folder, lock) as pipeline:
        (encoder,) = (each for each in pipeline.stages if isinstance(each, EncodeStage))
        async with CoreTurns(lock).turn():  # somebody else computes
            for (_, request), picture in zip(requests.items(), pictures, strict=True):
                await pipeline.submit(request, [picture])
            async with asyncio.timeout(1.5):  # less than anybody waits
                while encoder._scheduler.num_waiting < len(pictures):
                    await asyncio.sleep(0.005)
        answers = {name: await pipeline.tokens_of(name) for name in requests}
        await pipeline.settled()
        registry = pipeline.workers[Role.ENCODE].registry
        assert registry.get_sample_value("triptych_encoder_batch_items_count") == 1
        assert registry.get_sample_value("triptych_encoder_batch_items_sum") == len(pictures)
    assert answers == {
        name: list(engine.generate(request, [picture]))
        for (name, request), picture in zip(requests.items(), pictures, strict=True)
    }
