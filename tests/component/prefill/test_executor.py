"""The prefill executor over random tiny models: slices, cached beginnings and pauses change no
token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from services.prefill import executor as executor_module
from services.prefill.executor import FirstToken, PrefillExecutor, PreparedPrompt, PromptInput
from shared.model.sampler import SamplingRow, sample
from tests.support.engine import Engine
from tests.support.models import make_prompt

ModelDirs = Callable[[str], Path]

TOLERANCE = 1e-10
FAMILIES = ("llama", "qwen3", "qwen2_5_vl")
PICTURES: tuple[tuple[tuple[int, int], ...], ...] = ((), ((6, 4),), ((2, 2), (10, 6)))


@dataclass
class Bench:
    """An executor, prompts for it, and the logits that it chose tokens from."""

    engine: Engine
    executor: PrefillExecutor
    inputs: list[PromptInput]
    logits: list[torch.Tensor]

    def run(self, inputs: Sequence[PromptInput]) -> list[FirstToken | None]:
        self.logits.clear()
        return self.executor.run(inputs)

    def kv_of(self, each: PromptInput) -> torch.Tensor:
        num_tokens = len(each.prompt.token_ids)
        return self.engine.kv.gather(each.block_ids, num_tokens)

    def elsewhere(self, each: PromptInput) -> PromptInput:
        """The same prompt in blocks of its own."""
        blocks = self.engine.pool.allocate(len(each.block_ids))
        return replace(each, block_ids=blocks.block_ids)


def prepared(engine: Engine, family: str) -> Iterator[PromptInput]:
    for seed, pictures in enumerate(PICTURES):
        sizes = pictures if family == "qwen2_5_vl" else ()
        made = make_prompt(engine.spec, 9 + 6 * seed, sizes, seed=seed)
        running = engine.start(made)
        prompt = PreparedPrompt(
            token_ids=running.token_ids,
            positions=running.positions,
            next_pos=running.next_pos,
            media_rows=running.media_index,
            sampling=SamplingRow(),
        )
        yield PromptInput(prompt, running.media_embeddings, running.handle.block_ids)


@pytest.fixture(params=FAMILIES)
def bench(
    request: pytest.FixtureRequest, model_dir_of: ModelDirs, monkeypatch: pytest.MonkeyPatch
) -> Bench:
    family = request.param
    engine = Engine(model_dir_of(family), "float64", num_blocks=256)
    made = Bench(engine, PrefillExecutor(engine.model, engine.kv, engine.spec), [], [])

    def watched(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int | None]:
        made.logits.append(logits)
        return sample(logits, rows)

    monkeypatch.setattr(executor_module, "sample", watched)
    made.inputs = list(prepared(engine, family))
    return made


@pytest.mark.parametrize("chunk", [1, 3, 4, 7])
def test_chunks_equal_the_whole_prompt(bench: Bench, chunk: int) -> None:
    whole = bench.run(bench.inputs)
    (expected,) = bench.logits
    assert expected.std() > 1.0
    for each, token, row in zip(bench.inputs, whole, expected, strict=True):
        again, num_tokens = bench.elsewhere(each), len(each.prompt.token_ids)
        for start in range(0, num_tokens, chunk):
            stop = min(start + chunk, num_tokens)
            (first,) = bench.run([replace(again, start=start, stop=stop)])
            assert (first is None) == (stop < num_tokens)
            assert len(bench.logits) == (stop == num_tokens)  # no output head for a chunk within
        assert first == token
        assert float((bench.logits[0][0] - row).abs().max()) <= TOLERANCE
        assert float((bench.kv_of(again) - bench.kv_of(each)).abs().max()) <= TOLERANCE


def test_chunks_of_one_share_a_step_with_other_prompts(bench: Bench) -> None:
    whole = bench.run(bench.inputs)
    (expected,) = bench.logits
    long, *others = (bench.elsewhere(each) for each in bench.inputs[::-1])
    half = len(long.prompt.token_ids) // 2
    mixed = bench.run([replace(long, stop=half), *others])
    assert mixed == [None, *whole[-2::-1]]
    assert float((bench.logits[0][1:] - expected[:-1].flip(0)).abs().max()) <= TOLERANCE
    assert bench.run([replace(long, start=half)]) == whole[-1:]
    assert float((bench.logits[0] - expected[-1:]).abs().max()) <= TOLERANCE


def test_a_cached_beginning_needs_none_of_its_embeddings(bench: Bench) -> None:
    whole = bench.run(bench.inputs)
    (expected,) = bench.logits
    for each, token, row in zip(bench.inputs, whole, expected, strict=True):
        media = each.prompt.media_rows
        for start in range(4, len(each.prompt.token_ids), 4):
            num_needed = int((media >= start).sum())
            embeddings = each.embeddings[-num_needed:] if num_needed else None  # type: ignore[index]
            assert bench.run([replace(each, embeddings=embeddings, start=start)]) == [token]
            assert float((bench.logits[0][0] - row).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("bench", ["qwen2_5_vl"], indirect=True)
def test_a_picture_without_its_embedding_is_refused(bench: Bench) -> None:
    picture = bench.inputs[-1]
    assert picture.embeddings is not None
    for embeddings in (None, picture.embeddings[1:]):
        with pytest.raises(ValueError, match="only the last"):
            bench.run([replace(picture, embeddings=embeddings)])


@pytest.mark.parametrize("pauses", [(True, True), (True, False), (False, True)])
def test_a_paused_step_is_bit_equal_with_another_in_between(
    bench: Bench, pauses: tuple[bool, bool]
) -> None:
    whole = bench.run(bench.inputs)
    (expected,) = bench.logits
    again = [bench.elsewhere(each) for each in bench.inputs]
    step = bench.executor.begin(again)
    wanted = iter(pauses)
    num_paused = 0
    while (tokens := step.advance(lambda: next(wanted, False))) is None:
        num_paused += 1
        assert bench.run([bench.elsewhere(bench.inputs[0])]) == whole[:1]
        bench.logits.clear()
    assert (tokens, num_paused) == (whole, sum(pauses))
    assert torch.equal(bench.logits[0], expected)
    for one, other in zip(again, bench.inputs, strict=True):
        assert torch.equal(bench.kv_of(one), bench.kv_of(other))
