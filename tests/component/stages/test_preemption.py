"""Answers that give way to others, through the stage: same tokens, nothing left over."""

from __future__ import annotations

import asyncio

import pytest

from bench.prompts import PromptMaker
from services.decode.settings import DecodeSettings, SpeculationSettings
from services.local_engine import LocalEngine
from shared.errors import FailureKind
from shared.messages.control import Role
from shared.messages.descriptor import RequestDescriptor, SamplingParams
from shared.messages.events import FailedEvent, TokenEvent
from shared.runtime.host import ModelFolder
from shared.runtime.settings import ModelSettings
from tests.support.stages import GATEWAY, MODEL, Pipeline, running_pipeline

BLOCK_SIZE = 16
NUM_TOKENS = 60
SPECULATION = SpeculationSettings(mode="ngram")


@pytest.fixture(scope="module")
def requests(folder: ModelFolder) -> list[RequestDescriptor]:
    prompts = PromptMaker(folder.directory)
    made = []
    for number in range(6):
        sampling = SamplingParams(
            temperature=1.0 if number % 2 else 0.0,
            seed=number,
            max_tokens=NUM_TOKENS,
            frequency_penalty=0.3 if number == 3 else 0.0,
        )
        request = prompts.request([], f"Say it once more: {'ab ' * number}", sampling)
        made.append(
            request.model_copy(
                update={"request_id": f"r{number}", "gateway": GATEWAY, "model": MODEL}
            )
        )
    return made


@pytest.fixture(scope="module")
def undisturbed(folder: ModelFolder, requests: list[RequestDescriptor]) -> list[list[int]]:
    engine = LocalEngine(folder)
    return [list(engine.generate(request, [])) for request in requests]


def pool_bytes(folder: ModelFolder, requests: list[RequestDescriptor]) -> int:
    """Room for two of the longest answers; there are six."""
    longest = max(request.max_context_tokens for request in requests)
    num_blocks = 2 * -(-longest // BLOCK_SIZE)
    return num_blocks * folder.geometry(BLOCK_SIZE).bytes_per_block


async def answer(pipeline: Pipeline, request: RequestDescriptor) -> list[int]:
    """The answer's tokens, asked for again as the gateway does where it gave way."""
    tokens: list[int] = []
    for attempt in range(40):
        name = f"{request.request_id}-{attempt}"
        changes = {"request_id": name, "attempt": attempt, "emitted_token_ids": tuple(tokens)}
        await pipeline.submit(request.model_copy(update=changes), [])
        events = await pipeline.end_of(name)
        for event in events:
            if isinstance(event, TokenEvent):
                assert event.index == len(tokens)
                tokens.append(event.token_id)
        if not isinstance(events[-1], FailedEvent):
            return tokens
        assert (events[-1].kind, events[-1].retryable) == (FailureKind.PREEMPTED, True)
    raise AssertionError(f"{request.request_id} gave way {attempt} times")


def num_preempted(pipeline: Pipeline, how: str) -> float:
    registry = pipeline.workers[Role.DECODE].registry
    found = [
        sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name.endswith("num_preemptions_total") and sample.labels["how"] == how
    ]
    return sum(found)


@pytest.mark.parametrize("speculation", [SpeculationSettings(), SPECULATION], ids=["plain", "spec"])
@pytest.mark.parametrize(("how", "swap_bytes"), [("swap", 2**26), ("recompute", 0)])
async def test_answers_that_gave_way_have_the_same_tokens(
    how: str,
    swap_bytes: int,
    speculation: SpeculationSettings,
    folder: ModelFolder,
    requests: list[RequestDescriptor],
    undisturbed: list[list[int]],
) -> None:
    decode = DecodeSettings(
        model=ModelSettings(served_name=MODEL),
        drain_s=1.0,
        block_size=BLOCK_SIZE,
        kv_bytes=pool_bytes(folder, requests),
        reserve="grow",
        headroom_tokens=0,
        swap_bytes=swap_bytes,
        speculation=speculation,
    )
    async with running_pipeline(folder, decode=decode) as pipeline:
        answers = await asyncio.gather(*(answer(pipeline, request) for request in requests))
        assert answers == undisturbed
        assert num_preempted(pipeline, how) > 0
        await pipeline.settled()


async def test_a_worker_that_prefills_too_grows_in_the_same_pool(
    folder: ModelFolder, requests: list[RequestDescriptor], undisturbed: list[list[int]]
) -> None:
    hosts = {
        "block_size": BLOCK_SIZE,
        "kv_bytes": pool_bytes(folder, requests),
        "reserve": "grow",
        "headroom_tokens": 0,
        "swap_bytes": 2**26,
    }
    async with running_pipeline(folder, topology="1E 1PD", hosts=hosts) as pipeline:
        answers = await asyncio.gather(*(answer(pipeline, request) for request in requests))
        assert answers == undisturbed
        assert num_preempted(pipeline, "swap") > 0
        await pipeline.settled()
