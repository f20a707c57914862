"""Every question has one right answer, and requests follow the chat template's layout."""

from __future__ import annotations

import random

import pytest

from examples.plates.asks import (
    Turn,
    ask_all,
    ask_count,
    ask_description,
    ask_number,
    ask_which,
    describe,
)
from examples.plates.questions import Conversation, held_out, messages, without_repeats
from examples.plates.specs import PlateSpec, Spec, plate_spec, shapes_spec


def plates(*numbers: int) -> tuple[Spec, ...]:
    rng = random.Random(0)
    return tuple(plate_spec(rng, number) for number in numbers)


def test_held_out_is_deterministic_and_seeded() -> None:
    first, again, other = (list(held_out(12, seed)) for seed in (3, 3, 4))
    assert [s.messages for s in first] == [s.messages for s in again]
    assert [p.tobytes() for s in first for p in s.pictures] == [
        p.tobytes() for s in again for p in s.pictures
    ]
    assert [s.messages for s in first] != [s.messages for s in other]


def test_requests_end_with_an_open_question_and_hold_their_pictures() -> None:
    for sample in held_out(40, seed=1):
        assert sample.messages[-1]["role"] == "user"
        parts = [part for message in sample.messages for part in message["content"]]
        images = [part for part in parts if isinstance(part, dict) and part["type"] == "image"]
        assert len(images) == len(sample.pictures) <= 4
        assert sample.answer


def test_number_of_a_single_plate() -> None:
    turn = ask_number(random.Random(0), plates(57))
    assert turn is not None
    assert (turn.answer, turn.kind) == ("57", "number")


def test_which_picture_names_the_place() -> None:
    scene = plates(8, 57, 1984)
    for seed in range(10):
        turn = ask_which(random.Random(seed), scene)
        assert turn is not None
        asked = next(n for n in (1984, 57, 8) if str(n) in turn.question)
        assert turn.answer == f"picture {[8, 57, 1984].index(asked) + 1}"


def test_which_picture_is_not_asked_when_two_would_be_right() -> None:
    assert ask_which(random.Random(0), plates(8, 8)) is None


def test_all_numbers_in_order() -> None:
    turn = ask_all(random.Random(0), plates(8, 57, 1984))
    assert turn is not None
    assert turn.answer == "8, 57, 1984"


def test_questions_about_shapes_need_shapes() -> None:
    assert ask_count(random.Random(0), plates(8)) is None


def test_description_of_a_plate_names_number_and_colours() -> None:
    (spec,) = plates(57)
    assert isinstance(spec, PlateSpec)
    text = describe(spec).text
    assert "the number 57" in text
    assert spec.ink in text
    assert spec.background in text


@pytest.mark.parametrize("seed", range(20))
def test_description_counts_every_shape(seed: int) -> None:
    spec = shapes_spec(random.Random(seed))
    counts = [int(word) for word in describe(spec).text.split() if word.isdigit()]
    assert sum(counts) == len(spec.items)


def test_description_of_one_of_several_pictures() -> None:
    scene = plates(8, 57)
    turn = ask_description(random.Random(0), scene)
    assert turn is not None
    assert turn.answer in (describe(scene[0]).text, describe(scene[1]).text)


def test_messages_may_leave_the_last_answer_out() -> None:
    chat = Conversation((Turn("hi", "Hello!", "text only"), Turn("bye", "Goodbye!", "text only")))
    assert [m["role"] for m in messages(chat, open_last=False)] == ["user", "assistant"] * 2
    assert [m["role"] for m in messages(chat, open_last=True)] == ["user", "assistant", "user"]


def test_description_looks_at_the_shapes_it_counts() -> None:
    spec = next(s for s in map(shapes_spec, map(random.Random, range(99))) if len(s.kinds) == 2)
    answer = describe(spec)
    counts = [look for look in answer.looks if look.counts]
    assert len(counts) == 2
    for look, (colour, shape) in zip(counts, spec.kinds, strict=True):
        assert answer.text[look.begin : look.end] == str(len(look.marks))
        assert answer.text[look.end :].startswith(f" {colour} {shape}")
        assert {(spec.items[m].colour, spec.items[m].shape) for m in look.marks} == {
            (colour, shape)
        }
    assert sorted(m for look in counts for m in look.marks) == list(range(len(spec.items)))


def test_a_repeated_question_is_dropped_unless_it_shows_a_picture() -> None:
    first, again = (Turn("what number is it?", "8", "number", plates(8)) for _ in range(2))
    repeated = Turn("read the number.", "8", "number")
    chat = without_repeats(Conversation((first, repeated, again)))
    assert chat.turns == (first, again)
