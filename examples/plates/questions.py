"""Conversations about drawn pictures, each question with exactly one right answer.

`conversation` makes one from a seeded generator; `training_stream` and `held_out` are endless and
counted versions of it. A conversation's messages follow the chat template's layout: the user's
content is a list of `{"type": "image"}` (one for each picture, in order) and `{"type": "text",
"text": ...}` parts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from examples.plates import wording
from examples.plates.asks import ASKS, DRILLED, Ask, Turn
from examples.plates.draw import draw
from examples.plates.numbers import alike_numbers, any_numbers, draw_number
from examples.plates.specs import Spec, plate_spec, shapes_spec

Message = dict[str, Any]
MAX_PICTURES = 4


@dataclass(frozen=True)
class Conversation:
    """One or more turns, with an optional system message."""

    turns: tuple[Turn, ...]
    system: str | None = None

    @property
    def specs(self) -> tuple[Spec, ...]:
        return tuple(spec for turn in self.turns for spec in turn.pictures)


@dataclass(frozen=True)
class Sample:
    """A request as a client would send it, with the answer to expect: the last turn is still
    open."""

    pictures: tuple[Image.Image, ...]
    messages: tuple[Message, ...]
    answer: str
    kind: str
    turns: int


def messages(chat: Conversation, *, open_last: bool) -> list[Message]:
    """The conversation in the chat template's layout; `open_last` leaves out the last answer."""
    found: list[Message] = []
    if chat.system is not None:
        found.append({"role": "system", "content": chat.system})
    for turn in chat.turns:
        parts: list[Message] = [{"type": "image"} for _ in turn.pictures]
        found.append({"role": "user", "content": [*parts, {"type": "text", "text": turn.question}]})
        found.append({"role": "assistant", "content": turn.answer})
    return found[:-1] if open_last else found


def scene(rng: random.Random, pictures: int, *, held_out: bool | None) -> tuple[Spec, ...]:
    """Pictures of one request, plates and shapes mixed; `held_out` chooses the numbers (see
    `draw_number`)."""
    plate_share = rng.choice((0.0, 0.5, 1.0, 1.0))
    return tuple(
        plate_spec(rng, draw_number(rng, held_out=held_out))
        if rng.random() < plate_share
        else shapes_spec(rng, *rng.choice(((1, 1), (1, 5), (2, 5))))
        for _ in range(pictures)
    )


def crowded_picture(rng: random.Random) -> Spec:
    """A long number or, mostly, shapes to count: for training the vision tower alone."""
    return plate_spec(rng, _long_number(rng)) if rng.random() < 0.5 else shapes_spec(rng)


def _long_number(rng: random.Random) -> int:
    number = draw_number(rng, held_out=False)
    return number if number >= 100 or rng.random() < 0.2 else _long_number(rng)


def ask(
    rng: random.Random,
    pictures: tuple[Spec, ...],
    *,
    show: bool,
    choices: tuple[tuple[Ask, float], ...] = ASKS,
) -> Turn:
    """One question about `pictures`; `show` makes them part of the turn."""
    asks, weights = [one for one, _ in choices], [weight for _, weight in choices]
    while True:
        if (turn := rng.choices(asks, weights)[0](rng, pictures)) is not None:
            question = _as_typed(rng, turn.question)
            shown = pictures if show else ()
            return replace(turn, question=question, pictures=shown)


def chat_turn(rng: random.Random) -> Turn:
    """An exchange that needs no picture."""
    question, answer = rng.choice(wording.CHAT)
    return Turn(_as_typed(rng, question), answer, "text only")


def blind_turn(rng: random.Random) -> Turn:
    """A question about a picture that was not sent."""
    question = rng.choice((*wording.NUMBER, *wording.DESCRIBE))
    return Turn(_as_typed(rng, question), wording.NO_PICTURE, "text only")


def _as_typed(rng: random.Random, question: str) -> str:
    """The question as people type it: with or without capital letter and final mark."""
    question = " ".join(question.split())
    if rng.random() < 0.6:
        question = question[0].upper() + question[1:]
    return question.rstrip("?.") if rng.random() < 0.12 else question


def conversation(
    rng: random.Random, *, max_turns: int, max_pictures: int = MAX_PICTURES, held_out: bool | None
) -> Conversation:
    """One to `max_turns` turns. Pictures come with the first; now and then a later one shows a new
    picture."""
    system = rng.choice(wording.SYSTEMS) if rng.random() < 0.15 else None
    length = rng.randint(1, max_turns)
    kind = rng.random()
    if kind < 0.06:
        first = blind_turn(rng) if rng.random() < 0.3 else chat_turn(rng)
        return Conversation((first, *(chat_turn(rng) for _ in range(length - 1))), system)
    count = min(max_pictures, rng.choice((1, 1, 1, 2, 2, 3, 4)))
    pictures = scene(rng, count, held_out=held_out)
    turns = [chat_turn(rng)] if kind < 0.1 and length > 1 else []
    turns.append(ask(rng, pictures, show=True))
    for _ in range(length - len(turns)):
        turns.append(_follow_up(rng, pictures, held_out=held_out))
        if turns[-1].pictures:
            break
    return Conversation(tuple(turns), system)


def _follow_up(rng: random.Random, pictures: tuple[Spec, ...], *, held_out: bool | None) -> Turn:
    if rng.random() < 0.05:
        return chat_turn(rng)
    if len(pictures) == 1 and rng.random() < 0.1:
        return ask(rng, scene(rng, 1, held_out=held_out), show=True)
    return ask(rng, pictures, show=False)


def drill(rng: random.Random, *, max_turns: int, max_pictures: int) -> Conversation:
    """A conversation of the questions that are learned last, about trained numbers and shapes."""
    if max_pictures == 1 or rng.random() < 0.6:
        count = rng.randint(1, min(2, max_pictures))
        pictures: tuple[Spec, ...] = tuple(shapes_spec(rng) for _ in range(count))
    else:
        numbers = alike_numbers if rng.random() < 0.5 else any_numbers
        pictures = tuple(plate_spec(rng, n) for n in numbers(rng, rng.randint(2, max_pictures)))
    turns = (
        ask(rng, pictures, show=index == 0, choices=DRILLED)
        for index in range(rng.randint(1, max_turns))
    )
    return Conversation(tuple(turns))


def training_stream(
    seed: int, *, max_turns: int, max_pictures: int = MAX_PICTURES, drill_share: float = 0.0
) -> Iterator[Conversation]:
    """Endless conversations without a single held-out number; `drill_share` of them are drills."""
    rng = random.Random(f"train-{seed}")
    while True:
        if drill_share and rng.random() < drill_share:
            chat = drill(rng, max_turns=max_turns, max_pictures=max_pictures)
        else:
            chat = conversation(rng, max_turns=max_turns, max_pictures=max_pictures, held_out=False)
        yield without_repeats(chat)


def without_repeats(chat: Conversation) -> Conversation:
    """The conversation without answers that one could copy from an earlier turn."""
    first: dict[tuple[object, ...], Turn] = {}
    for turn in chat.turns:
        shown = len(turn.pictures) if first else 0
        first.setdefault((turn.kind, turn.answer, turn.looks, shown), turn)
    return replace(chat, turns=tuple(first.values()))


def held_out_conversations(n: int, seed: int = 0, max_turns: int = 2) -> Iterator[Conversation]:
    """`n` conversations that training never saw: fresh pictures, every second one with held-out
    numbers only."""
    rng = random.Random(f"held-out-{seed}")
    for index in range(n):
        yield conversation(rng, max_turns=max_turns, held_out=True if index % 2 else None)


def held_out(n: int, seed: int = 0, max_turns: int = 2) -> Iterator[Sample]:
    """`held_out_conversations` as requests.

    Earlier turns of a conversation hold their right answers; the last question is open.
    """
    for chat in held_out_conversations(n, seed, max_turns):
        last = chat.turns[-1]
        yield Sample(
            pictures=tuple(draw(spec) for spec in chat.specs),
            messages=tuple(messages(chat, open_last=True)),
            answer=last.answer,
            kind=last.kind,
            turns=len(chat.turns),
        )
