"""Bias, penalties, minimum length and logprobs, against plain loops over float64."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.messages.descriptor import SamplingParams
from shared.model.sampler import sample
from shared.model.sampling_row import SamplingRow, SamplingState
from shared.model.shaping import shaped

VOCAB = 40
STOP = (7, 8)
ids = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30)
penalty = st.sampled_from([0.0, 0.0, -1.5, 0.3, 2.0])
params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.3]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.8]),
    min_p=st.sampled_from([0.0, 0.05]),
    presence_penalty=penalty,
    frequency_penalty=penalty,
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.5, 1.7]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100), max_size=5).map(
        lambda biases: tuple(biases.items())
    ),
    seed=st.integers(0, 2**64 - 1),
    min_tokens=st.sampled_from([0, 0, 5, 20]),
    stop_token_ids=st.just(STOP),
    num_logprobs=st.sampled_from([None, 0, 3, 20]),
)


@st.composite
def sequences(draw: st.DrawFn) -> tuple[SamplingParams, list[int], list[int]]:
    return draw(params), draw(ids), draw(st.lists(st.integers(0, VOCAB - 1), max_size=30))


Drawn = tuple[SamplingParams, list[int], list[int]]


def random_logits(num_rows: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, VOCAB, generator=generator, dtype=dtype) * 4


def reference(
    logits: list[float], sampling: SamplingParams, prompt: list[int], answer: list[int]
) -> list[float]:
    """One row, one token after the other, as the parameters are defined."""
    counts, biases = Counter(answer), dict(sampling.logit_bias)
    result = []
    for token, logit in enumerate(logits):
        value = logit + biases.get(token, 0.0)
        if token in counts or token in prompt:
            factor = sampling.repetition_penalty
            value = value / factor if value > 0 else value * factor
        if counts[token]:
            value -= sampling.frequency_penalty * counts[token] + sampling.presence_penalty
        if token in sampling.stop_token_ids and len(answer) < sampling.min_tokens:
            value = -math.inf
        result.append(value)
    return result


@settings(deadline=None, max_examples=50)
@given(drawn=st.lists(sequences(), min_size=1, max_size=5))
def test_shaped_logits_are_those_of_the_definition(drawn: list[Drawn]) -> None:
    logits = random_logits(len(drawn))
    rows = [SamplingState(*each).row() for each in drawn]
    before = logits.clone()
    found = shaped(logits, rows)
    assert torch.equal(logits, before), "the model's own logits were changed"
    for row, each in enumerate(drawn):
        expected = reference(logits[row].tolist(), *each)
        np.testing.assert_allclose(found[row].numpy(), expected, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=50)
@given(drawn=st.lists(sequences(), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_a_row_alone_is_the_row_in_a_batch(drawn: list[Drawn], seed: int) -> None:
    logits = random_logits(len(drawn), seed, torch.float32)
    rows = [SamplingState(*each).row() for each in drawn]
    together, shaped_together = sample(logits, rows), shaped(logits, rows)
    for i, row in enumerate(rows):
        assert sample(logits[i : i + 1], [row]) == [together[i]]
        assert torch.equal(shaped(logits[i : i + 1], [row])[0], shaped_together[i])


@settings(deadline=None, max_examples=50)
@given(each=sequences(), newer=ids, seed=st.integers(0, 99))
def test_a_recovered_sequence_goes_on_as_it_would_have(
    each: Drawn, newer: list[int], seed: int
) -> None:
    sampling, prompt, answer = each
    lived = SamplingState(sampling, prompt, answer)
    for token in newer:
        assert lived.append(token) is None
    recovered = SamplingState(sampling, prompt, answer + newer)
    logits = random_logits(1, seed, torch.float32)
    assert sample(logits, [lived.row()]) == sample(logits, [recovered.row()])


@settings(deadline=None, max_examples=50)
@given(each=sequences(), drafts=ids, seed=st.integers(0, 99))
def test_guessed_tokens_count_like_tokens_of_the_answer(
    each: Drawn, drafts: list[int], seed: int
) -> None:
    """Rows of one sequence, each after one guess more, choose as the plain steps would."""
    sampling, prompt, answer = each
    state = SamplingState(sampling, prompt, answer)
    rows = [state.row(tuple(drafts[:n])) for n in range(len(drafts) + 1)]
    logits = random_logits(len(rows), seed, torch.float32)
    verified = sample(logits, rows)
    for n, found in enumerate(verified):
        plain = SamplingState(sampling, prompt, answer + drafts[:n])
        assert sample(logits[n : n + 1], [plain.row()]) == [found]


def test_a_minimum_length_bans_stop_tokens_up_to_it() -> None:
    sampling = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=STOP)
    state = SamplingState(sampling, prompt_ids=[1])
    logits = torch.zeros(1, VOCAB)
    logits[0, 7] = 9.0
    chosen = []
    for _ in range(3):
        (token,) = sample(logits, [state.row()])
        assert token is not None
        chosen.append(token.token_id)
        state.append(token.token_id)
    assert chosen == [0, 0, 7]


def test_a_penalty_smaller_than_sixteen_bit_logits_can_tell_counts() -> None:
    sampling = SamplingParams(temperature=0.0, presence_penalty=0.001)
    state = SamplingState(sampling, prompt_ids=[1], answer_ids=[3])
    logits = torch.full((1, VOCAB), -9.0, dtype=torch.bfloat16)
    logits[0, 3] = logits[0, 30] = 8.0
    (token,) = sample(logits, [state.row()])
    assert token is not None
    assert token.token_id == 30


def test_a_placeholder_beyond_the_vocabulary_is_passed_over() -> None:
    sampling = SamplingParams(temperature=0.0, repetition_penalty=2.0)
    state = SamplingState(sampling, prompt_ids=[VOCAB + 5, 3, VOCAB])
    logits = random_logits(2)
    other = SamplingState(sampling, prompt_ids=[4])
    found = shaped(logits, [state.row(), other.row()])
    expected = reference(logits[0].tolist(), sampling, [3], [])
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(found[1].numpy(), reference(logits[1].tolist(), sampling, [4], []))


def test_drawn_tokens_follow_the_shaped_distribution() -> None:
    num_draws = 20_000
    sampling = SamplingParams(
        repetition_penalty=1.3,
        frequency_penalty=0.4,
        presence_penalty=-0.5,
        logit_bias=((0, 2.0), (3, -100.0)),
        top_k=12,
        temperature=1.2,
        seed=5,
    )
    prompt, answer = [1, 2, 3], [4, 4, 5]
    row = SamplingState(sampling, prompt, answer).row()
    logits = random_logits(1, 3) / 4
    rows = [replace(row, index=i) for i in range(num_draws)]
    drawn = [each.token_id for each in sample(logits.expand(num_draws, -1), rows) if each]
    counts = np.bincount(drawn, minlength=VOCAB)
    shaped_row = np.array(reference(logits[0].tolist(), sampling, prompt, answer))
    kept = np.argsort(-shaped_row)[:12]
    weights = np.zeros(VOCAB)
    weights[kept] = np.exp(shaped_row[kept] / 1.2)
    expected = weights / weights.sum() * num_draws
    assert not counts[expected == 0].any()
    possible = expected > 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 31.3  # 99.9 % of a chi-square with 11 degrees of freedom


@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
def test_logprobs_are_the_models_own(num_top: int) -> None:
    """Whatever the settings: of the raw distribution, equal ones by token id."""
    logits = random_logits(6, 1, torch.float32).round()
    sampling = SamplingParams(
        temperature=1.5, logit_bias=((3, 50.0),), num_logprobs=num_top, top_k=3, seed=1
    )
    rows = [SamplingState(sampling, [1]).row() for _ in range(6)]
    # A row that asks for less, and one that asks for nothing, stand between them.
    rows[2] = replace(rows[2], num_logprobs=0)
    rows[3] = replace(rows[3], num_logprobs=None)
    for i, found in enumerate(sample(logits, rows)):
        assert found is not None
        if i == 3:
            assert found.logprobs is None
            continue
        raw = logits[i].double().numpy()
        logprobs = raw - np.log(np.exp(raw).sum())
        assert found.logprobs is not None
        assert found.logprobs.logprob == pytest.approx(logprobs[found.token_id], abs=2e-6)
        best = sorted(range(VOCAB), key=lambda token, row=logprobs: (-row[token], token))
        best = best[: 0 if i == 2 else num_top]
        assert [token for token, _ in found.logprobs.top] == best
        told = [value for _, value in found.logprobs.top]
        np.testing.assert_allclose(told, logprobs[best], atol=2e-6)


def test_rows_without_controls_are_not_even_copied() -> None:
    logits = random_logits(3)
    assert shaped(logits, [SamplingRow(), SamplingRow(temperature=1.0), SamplingRow()]) is logits
    assert SamplingState(SamplingParams(top_p=0.5), [1, 2]).row().controls is None
