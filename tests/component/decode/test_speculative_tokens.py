"""Guessing ahead changes no token, whoever guesses and however the answer is sampled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from services.decode.draft import DraftModel
from services.decode.speculator import NgramProposer, Proposer
from shared.cache.geometry import KvGeometry
from shared.cache.kv_cache import KvCache
from shared.demo import model_dir
from shared.messages.descriptor import SamplingParams
from shared.model.batch import ForwardBatch, SequenceInput
from shared.model.decoder import LanguageModel
from shared.model.grammar import Grammars
from shared.model.loader import load_language_model
from shared.modelspec import ModelSpec
from shared.text import grammar
from tests.support.speculating import BLOCK_SIZE, Ask, Decoder, Foreseen

PROPOSERS = ("ngram", "draft", "same model", "foreseen")
GREEDY = SamplingParams(temperature=0.0, max_tokens=22)
SAMPLINGS = (
    GREEDY,
    SamplingParams(temperature=0.8, seed=11, max_tokens=17),
    SamplingParams(temperature=1.3, top_k=20, top_p=0.9, min_p=0.01, seed=12, max_tokens=20),
    SamplingParams(temperature=0.7, presence_penalty=1.5, frequency_penalty=0.5, max_tokens=19),
    SamplingParams(temperature=0.0, repetition_penalty=1.4, max_tokens=21),
    SamplingParams(temperature=0.0, max_tokens=2),
    SamplingParams(temperature=0.5, seed=3, max_tokens=23, logit_bias=((9, 4.0),)),
    SamplingParams(temperature=0.9, seed=4, max_tokens=5, num_logprobs=2),
)


@pytest.fixture(scope="module")
def model(model_dir_of: Callable[[str], Path]) -> LanguageModel:
    folder = model_dir_of("llama")
    return load_language_model(folder, ModelSpec.load(folder), dtype="float32")


@pytest.fixture(scope="module")
def similar(model_dir_of: Callable[[str], Path]) -> LanguageModel:
    """The same model with disturbed weights: it guesses right now and then."""
    folder = model_dir_of("llama")
    made = load_language_model(folder, ModelSpec.load(folder), dtype="float32")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in made.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(weight + 0.05 * weight.std() * noise)
    return made


@pytest.fixture(scope="module")
def asks() -> list[Ask]:
    rng = np.random.default_rng(2)
    words = [tuple(rng.integers(2, 150, size=size).tolist()) for size in (5, 9, 14, 3, 7, 8, 6, 4)]
    return [
        Ask(word + word[:3] + word, sampling)  # a text that quotes itself
        for word, sampling in zip(words, SAMPLINGS, strict=True)
    ]


def draft_model(model: LanguageModel, target: LanguageModel, num_blocks: int = 400) -> DraftModel:
    geometry = KvGeometry.of(model.spec, block_size=BLOCK_SIZE, dtype="float32")
    kv = KvCache(geometry, num_blocks)
    return DraftModel(model, kv, num_target_tokens=target.spec.vocab_size)


def proposer_of(
    name: str, model: LanguageModel, similar: LanguageModel, plain: list[list[int | None]]
) -> Proposer:
    if name == "ngram":
        return NgramProposer()
    if name == "foreseen":
        return Foreseen(plain)
    return draft_model(similar if name == "draft" else model, model)


@pytest.mark.parametrize("num_drafts", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", PROPOSERS)
def test_tokens_are_those_of_single_steps_in_every_batch(
    name: str, num_drafts: int, model: LanguageModel, similar: LanguageModel, asks: list[Ask]
) -> None:
    decoder = Decoder(model)
    alone = [decoder.answer([ask]).tokens[0] for ask in asks]
    for size in (1, 3, 8):
        proposer = proposer_of(name, model, similar, alone)
        guessed = decoder.answer(asks[:size], proposer, num_tokens=num_drafts)
        assert guessed.tokens == alone[:size]
        assert guessed.num_drafted > 0
        if name != "ngram":
            assert 0 < guessed.num_accepted <= guessed.num_drafted
        if name == "draft" and size == 8:
            assert guessed.num_accepted < guessed.num_drafted


@pytest.mark.parametrize("name", PROPOSERS)
def test_a_stop_token_inside_a_draft_ends_the_answer_there(
    name: str, model: LanguageModel, similar: LanguageModel, asks: list[Ask]
) -> None:
    decoder = Decoder(model)
    endless = decoder.answer([Ask(asks[0].prompt_ids, GREEDY)]).tokens[0]
    for position in range(1, 12):
        stop = endless[position]
        assert stop is not None
        if stop in endless[:1]:
            continue
        ask = Ask(asks[0].prompt_ids, GREEDY.model_copy(update={"stop_token_ids": (stop,)}))
        plain = decoder.answer([ask]).tokens
        assert plain[0][-1] == stop
        foresight = [endless] if name == "foreseen" else plain
        guessed = decoder.answer([ask], proposer_of(name, model, similar, foresight))
        assert guessed.tokens == plain


@pytest.mark.parametrize("max_tokens", range(2, 9))
def test_no_guess_goes_beyond_max_tokens(
    max_tokens: int, model: LanguageModel, asks: list[Ask]
) -> None:
    decoder = Decoder(model)
    ask = Ask(asks[0].prompt_ids, GREEDY.model_copy(update={"max_tokens": max_tokens}))
    plain = decoder.answer([ask]).tokens
    guessed = decoder.answer([ask], draft_model(model, model))
    assert guessed.tokens == plain
    assert len(plain[0]) == max_tokens
    assert guessed.num_drafted == guessed.num_accepted  # the same model errs nowhere
    assert guessed.num_drafted + guessed.num_steps == max_tokens - 1


def test_a_draft_model_without_room_guesses_nothing_and_harms_nothing(
    model: LanguageModel, asks: list[Ask]
) -> None:
    decoder = Decoder(model)
    plain = decoder.answer(asks).tokens
    for num_blocks in (1, 8, 20):
        assert decoder.answer(asks, draft_model(model, model, num_blocks)).tokens == plain


class Damaged:
    """A model whose output is not a number wherever it reads a certain token."""

    def __init__(self, model: LanguageModel, token_id: int) -> None:
        self._model, self._token_id = model, token_id
        self.spec, self.dtype = model.spec, model.dtype

    def __call__(
        self, batch: ForwardBatch, kv: KvCache, *, all_positions: bool = False
    ) -> torch.Tensor:
        logits: torch.Tensor = self._model(batch, kv, all_positions=all_positions).clone()
        last = batch.cu_seqlens_q[1:] - 1
        read = batch.token_ids if all_positions else batch.token_ids[last]
        logits[read == self._token_id] = torch.nan
        return logits


@pytest.mark.parametrize("position", [1, 4, 5, 6, 9])
def test_output_that_is_not_finite_ends_the_same_answer_at_the_same_place(
    position: int, model: LanguageModel, asks: list[Ask]
) -> None:
    pair = [Ask(asks[0].prompt_ids, GREEDY), Ask(asks[1].prompt_ids, SAMPLINGS[1])]
    endless = Decoder(model).answer(pair).tokens
    token_id = endless[0][position]
    assert token_id is not None
    damaged = Decoder(Damaged(model, token_id))  # type: ignore[arg-type]
    plain = damaged.answer(pair).tokens
    assert plain[0][-1] is None
    for proposer in (Foreseen(endless, wrong_every=1000), draft_model(model, model)):
        assert damaged.answer(pair, proposer).tokens == plain


@pytest.mark.parametrize("ends", [True, False], ids=["stops", "goes on behind the stop token"])
def test_a_grammar_is_followed_through_drafts_that_break_it_and_drafts_that_do_not(
    ends: bool,
) -> None:
    spec = ModelSpec.load(model_dir())
    model = load_language_model(model_dir(), spec, dtype="float32")
    decoder = Decoder(model, grammars=Grammars(model_dir(), spec))
    asks = [
        Ask(
            (5, 6, 7, 5, 6, 7, 5, 6),
            SamplingParams(
                temperature=temperature,
                seed=seed,
                max_tokens=24,
                stop_token_ids=spec.eos_token_ids if ends else (),
                logit_bias=() if ends else ((spec.eos_token_ids[0], 3.0),),
                grammar=grammar.regex("([A-C]{2,4}-[0-9]{3}ü? ?)+"),
            ),
        )
        for seed, temperature in enumerate((0.0, 1.0, 1.0, 1.5))
    ]
    plain = decoder.answer(asks).tokens
    assert ends or any(spec.eos_token_ids[0] in tokens[:-1] for tokens in plain)
    for proposer in (
        NgramProposer(),
        draft_model(model, model),
        Foreseen(plain, wrong_every=3),
        Foreseen(plain, wrong_every=1000),
    ):
        assert decoder.answer(asks, proposer).tokens == plain


def test_what_is_sampled_under_speculation_is_distributed_as_the_model_says(
    model: LanguageModel, similar: LanguageModel
) -> None:
    """Answers of three tokens behind a fixed prompt, each out of the three likeliest."""
    decoder, prompt, num = Decoder(model), (17, 23, 5, 42, 8), 3000
    seen: Counter[tuple[int | None, ...]] = Counter()
    drafted = accepted = 0
    for start in range(0, num, 250):
        asks = [
            Ask(prompt, SamplingParams(seed=seed, max_tokens=3, temperature=2.0, top_k=3))
            for seed in range(start, start + 250)
        ]
        guessed = decoder.answer(asks, draft_model(similar, model, 4000))
        drafted, accepted = drafted + guessed.num_drafted, accepted + guessed.num_accepted
        seen.update(map(tuple, guessed.tokens))
    assert drafted > accepted > 0
    expected = {answer: num * chance for answer, chance in _distribution(model, prompt, (), 1.0)}
    assert sum(expected.values()) == pytest.approx(num)
    assert set(seen) <= set(expected)
    common = [answer for answer, count in expected.items() if count >= 5]
    assert len(common) >= 12
    chi_square = sum((seen[answer] - expected[answer]) ** 2 / expected[answer] for answer in common)
    rare = num - sum(expected[answer] for answer in common)
    if rare >= 5:
        chi_square += (num - sum(seen[answer] for answer in common) - rare) ** 2 / rare
    degrees = len(common) - (rare < 5)
    # 99.9 % of a chi-square (Wilson and Hilferty's approximation).
    limit = degrees * (1 - 2 / (9 * degrees) + 3.09 * (2 / (9 * degrees)) ** 0.5) ** 3
    assert chi_square < limit


def _distribution(
    model: LanguageModel, prompt: tuple[int, ...], answer: tuple[int, ...], chance: float
) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every answer of three tokens and its probability, from the model's logits alone."""
    if len(answer) == 3:
        yield answer, chance
        return
    geometry = KvGeometry.of(model.spec, block_size=BLOCK_SIZE, dtype="float32")
    tokens = (*prompt, *answer)
    inputs = SequenceInput(tokens, range(len(tokens)), range(2))
    logits = model(ForwardBatch.pack([inputs], BLOCK_SIZE), KvCache(geometry, 2))[0]
    values, token_ids = logits.double().topk(3)
    chances = torch.softmax(values / 2.0, -1)
    for token_id, each in zip(token_ids.tolist(), chances.tolist(), strict=True):
        yield from _distribution(model, prompt, (*answer, token_id), chance * each)
