"""Held-out numbers stay out of training, in plates and in words."""

from __future__ import annotations

import random
import re
from itertools import islice

from examples.plates.numbers import draw_number, is_held_out
from examples.plates.questions import held_out_conversations, training_stream
from examples.plates.specs import PlateSpec


def test_a_tenth_of_the_long_numbers_is_held_out() -> None:
    share = sum(map(is_held_out, range(100, 10_000))) / 9_900
    assert 0.08 < share < 0.12


def test_no_short_number_is_held_out() -> None:
    assert not any(map(is_held_out, range(100)))


def test_draw_number_keeps_to_its_side() -> None:
    rng = random.Random(0)
    assert not any(is_held_out(draw_number(rng, held_out=False)) for _ in range(500))
    assert all(is_held_out(draw_number(rng, held_out=True)) for _ in range(50))


def test_every_length_is_drawn() -> None:
    rng = random.Random(0)
    lengths = {len(str(draw_number(rng, held_out=False))) for _ in range(100)}
    assert lengths == {1, 2, 3, 4}


def test_training_never_shows_or_names_a_held_out_number() -> None:
    for chat in islice(training_stream(0, max_turns=4), 800):
        shown = [spec.number for spec in chat.specs if isinstance(spec, PlateSpec)]
        words = " ".join(f"{turn.question} {turn.answer}" for turn in chat.turns)
        named = [int(found) for found in re.findall(r"\d+", words)]
        assert not any(map(is_held_out, shown + named))


def test_every_second_held_out_conversation_has_only_held_out_numbers() -> None:
    chats = list(held_out_conversations(100, seed=5))
    shown = [s.number for chat in chats[1::2] for s in chat.specs if isinstance(s, PlateSpec)]
    assert shown
    assert all(map(is_held_out, shown))
