"""Videos through the three stages: the tokens of the engine that calls them one by one."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.local_engine import LocalEngine
from shared.modelspec import ModelSpec
from shared.runtime.host import ModelFolder
from tests.support.stages import greedy_request, running_pipeline
from tests.support.video_folders import (
    VIDEO_FAMILIES,
    build_video_folder,
    clip_file,
    media_prompt,
)
from tests.support.vision_folders import picture_file

FILES = [picture_file(21, 37), clip_file(30), clip_file(9, rate=3, seed=1)]


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
async def test_tokens_equal_the_local_engine(name: str, tmp_path: Path) -> None:
    spec = ModelSpec.load(build_video_folder(name, tmp_path))
    folder = ModelFolder(tmp_path, spec, spec.dtype, "cpu")
    prompt = media_prompt(tmp_path, [*FILES, "what?"])
    request = greedy_request(prompt, "mixed", max_tokens=12)
    async with running_pipeline(folder) as pipeline:
        await pipeline.submit(request, FILES)
        answer = await pipeline.tokens_of("mixed")
        await pipeline.settled()
    assert len(answer) == 12
    assert answer == list(LocalEngine(folder).generate(request, FILES))
