"""Draft lengths, acceptance and n-grams, without a model."""

from __future__ import annotations

import itertools
import random

import pytest

from services.decode.ngram import NgramIndex
from services.decode.speculation import (
    PROBE_EVERY,
    Acceptance,
    SpeculationPolicy,
    StepCost,
    num_accepted,
)
from shared.errors import SettingsError


def policy(base_s: float, token_s: float, max_tokens: int = 4) -> SpeculationPolicy:
    """A policy that has seen steps of such a cost."""
    made = SpeculationPolicy(max_tokens)
    for number in range(400):
        num_tokens = 1 + number % 12
        made.observe_step(num_tokens, base_s + token_s * num_tokens)
    return made


@pytest.mark.parametrize(
    ("draft", "sampled", "count"),
    [([], [5], 0), ([1, 2], [1, 2, 3], 2), ([1, 2], [1, 9, 3], 1), ([1, 2], [None, 2, 3], 0)],
)
def test_accepts_up_to_the_first_difference(
    draft: list[int], sampled: list[int | None], count: int
) -> None:
    assert num_accepted(draft, sampled) == count


def test_the_cost_of_a_step_is_learned_in_spite_of_noise_and_hiccups() -> None:
    rng, cost = random.Random(3), StepCost()
    for number in range(2000):
        num_tokens = rng.choice((1, 2, 5, 9))
        step_s = (10e-3 + 1e-3 * num_tokens) * rng.uniform(0.9, 1.1)
        cost.observe(num_tokens, step_s * (50 if number % 100 == 99 else 1))
    assert cost.expected_s(5) == pytest.approx(15e-3, rel=0.25)


def test_steps_of_one_size_leave_the_learned_price_of_a_token_alone() -> None:
    cost = StepCost()
    for number in range(100):
        cost.observe(1 + number % 5, 1e-3 * (1 + number % 5))
    learned_s = cost.token_s
    for _ in range(1000):
        cost.observe(1, 1e-3)
    assert cost.token_s == pytest.approx(learned_s, rel=0.2)


def test_cheap_tokens_and_good_guesses_get_the_longest_drafts() -> None:
    states = [Acceptance(0.95), Acceptance(0.05)]
    lengths = policy(10e-3, 0.5e-3).decide(states, [9, 9])
    assert lengths.tolist() == [4, 0]
    assert policy(10e-3, 0.5e-3).decide([Acceptance(0.95)], [2]).tolist() == [2]


def test_nothing_is_guessed_where_a_token_costs_as_much_as_a_step() -> None:
    assert policy(1e-6, 10e-3).decide([Acceptance(0.9)] * 3, [4, 4, 4]).tolist() == [0, 0, 0]


def test_an_expensive_draft_model_is_left_alone() -> None:
    made = policy(10e-3, 0.1e-3)
    assert made.decide([Acceptance(0.5)], [4]).any()
    made.observe_draft(4, 4 * 20e-3)
    assert not made.decide([Acceptance(0.5)], [4]).any()


@pytest.mark.parametrize("seed", range(5))
def test_the_lengths_are_the_best_there_are(seed: int) -> None:
    """Against every combination: expected tokens over expected seconds."""
    rng = random.Random(seed)
    base_s, token_s = rng.uniform(1e-3, 20e-3), rng.uniform(0.2e-3, 4e-3)
    made = policy(base_s, token_s, max_tokens=3)
    chances = [rng.uniform(0.05, 0.95) for _ in range(4)]

    def rate(lengths: tuple[int, ...]) -> float:
        gained = sum(p**j for p, k in zip(chances, lengths, strict=True) for j in range(1, k + 1))
        return (4 + gained) / made.cost.expected_s(4 + sum(lengths))

    best = max(rate(lengths) for lengths in itertools.product(range(4), repeat=4))
    chosen = made.decide([Acceptance(p) for p in chances], [9] * 4)
    assert rate(tuple(chosen.tolist())) == pytest.approx(best, rel=1e-6)


def test_a_hopeless_sequence_is_tried_again_now_and_then() -> None:
    made, state = policy(10e-3, 5e-3), Acceptance(0.01)
    drafted = [int(made.decide([state], [4])[0]) for _ in range(3 * PROBE_EVERY)]
    assert sum(drafted) == 3
    assert max(drafted) == 1


def test_outcomes_move_the_estimate() -> None:
    made, state = policy(10e-3, 1e-3), Acceptance()
    for _ in range(50):
        made.observe_outcome(state, 4, 4)
    assert state.probability > 0.95
    for _ in range(50):
        made.observe_outcome(state, 4, 0)
    assert state.probability < 0.05


def test_before_anything_was_measured_steps_are_plain() -> None:
    assert SpeculationPolicy(4).decide([Acceptance(1.0)], [4]).tolist() == [0]


@pytest.mark.parametrize("max_tokens", [0, 17])
def test_a_draft_length_out_of_bounds_is_refused(max_tokens: int) -> None:
    with pytest.raises(SettingsError, match=f"is {max_tokens}, allowed are 1 to 16"):
        SpeculationPolicy(max_tokens)


class TestNgramIndex:
    def test_what_followed_the_same_words_is_proposed(self) -> None:
        history = [1, 2, 3, 4, 5, 9, 9, 1, 2, 3]
        assert NgramIndex().propose(history, 3) == [4, 5, 9]

    def test_the_longest_match_wins_and_then_the_newest(self) -> None:
        history = [7, 1, 2, 3, 50, 8, 1, 2, 3, 60, 0, 1, 2, 3]
        assert NgramIndex().propose(history, 1) == [60]
        assert NgramIndex().propose([*history[:-4], 7, 1, 2, 3], 1) == [50]

    def test_a_period_goes_on(self) -> None:
        assert NgramIndex().propose([4, 5, 6, 4, 5, 6, 4, 5], 5) == [6, 4, 5, 6, 4]

    def test_new_text_gets_nothing(self) -> None:
        assert NgramIndex().propose([1, 2, 3, 4, 5], 4) == []
        assert NgramIndex().propose([], 4) == []

    def test_growing_step_by_step_equals_reading_it_all_at_once(self) -> None:
        rng = random.Random(1)
        history, index = [], NgramIndex()
        for _ in range(300):
            history.append(rng.randrange(4))
            assert index.propose(history, 4) == NgramIndex().propose(history, 4)
