"""Sounds through the three stages: the tokens of the engine that calls them one by one."""

from __future__ import annotations

from pathlib import Path

from services.local_engine import LocalEngine
from shared.errors import FailureKind
from shared.messages.descriptor import RequestDescriptor
from shared.messages.events import FailedEvent
from shared.modelspec import ModelSpec
from shared.runtime.host import ModelFolder
from tests.support.audio_folders import audio_prompt, build_audio_folder, encoded_file, wav_file
from tests.support.stages import greedy_request, running_pipeline

FILES = [wav_file(12_347), encoded_file("flac", "flac", 7_777, 4), wav_file(321, 2)]


def asked(folder: Path, name: str) -> RequestDescriptor:
    prompt = audio_prompt(folder, [*FILES, "what?"])
    return greedy_request(prompt, name, max_tokens=12)


async def test_tokens_equal_the_local_engine(tmp_path: Path) -> None:
    spec = ModelSpec.load(build_audio_folder("", tmp_path))
    folder = ModelFolder(tmp_path, spec, spec.dtype, "cpu")
    request = asked(tmp_path, "sounds")
    async with running_pipeline(folder) as pipeline:
        await pipeline.submit(request, FILES)
        answer = await pipeline.tokens_of("sounds")
        # Again, with embeddings and the prompt's beginning cached.
        await pipeline.submit(asked(tmp_path, "again"), FILES)
        again = await pipeline.tokens_of("again")
        await pipeline.settled()
    assert len(answer) == 12
    assert answer == again == list(LocalEngine(folder).generate(request, FILES))


async def test_a_sound_that_is_not_what_was_counted_fails_clearly(tmp_path: Path) -> None:
    spec = ModelSpec.load(build_audio_folder("", tmp_path))
    folder = ModelFolder(tmp_path, spec, spec.dtype, "cpu")
    request = asked(tmp_path, "wrong")
    first = request.media[0]
    wrong = first.model_copy(update={"grid_thw": (first.grid_thw[0] + 2, 1, 1)})
    request = request.model_copy(update={"media": (wrong, *request.media[1:])})
    async with running_pipeline(folder) as pipeline:
        await pipeline.submit(request, FILES)
        last = (await pipeline.end_of("wrong"))[-1]
        await pipeline.settled()
    assert isinstance(last, FailedEvent)
    assert last.kind is FailureKind.INTERNAL
    assert "the gateway computed (41, 1, 1)" in last.message
