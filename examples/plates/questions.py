"""Conversations about drawn pictures, each question with exactly one right answer.

`conversation` makes one from a seeded generator; `training_stream` and `held_out` are endless and counted versions of
it. A conversation's messages follow the chat template's layout: the user's content is a list of `{"type": "image"}`
(one for each picture, in order) and `{"type": "text", "text": ...}` parts.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image

from examples.plates import wording
from examples.plates.draw import (
    COLOUR_NAMES,
    SHAPES,
    PlateSpec,
    ShapesSpec,
    Spec,
    draw,
    plate_spec,
    shapes_spec,
)
from examples.plates.numbers import draw_number

Message = dict[str, Any]
MAX_PICTURES = 4


@dataclass(frozen=True)
class Turn:
    """One question, its only right answer, its kind, and the pictures that came with it."""

    question: str
    answer: str
    kind: str
    pictures: tuple[Spec, ...] = ()


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
    """A request as a client would send it, with the answer to expect: the last turn is still open."""

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


Ask = Callable[[random.Random, tuple[Spec, ...]], Turn | None]
"""Asks about the pictures of a request, or gives None where its question would have no single right answer."""


def _plates(scene: tuple[Spec, ...]) -> list[tuple[int, PlateSpec]]:
    return [(i, spec) for i, spec in enumerate(scene) if isinstance(spec, PlateSpec)]


def _shapes(scene: tuple[Spec, ...]) -> list[tuple[int, ShapesSpec]]:
    return [(i, spec) for i, spec in enumerate(scene) if isinstance(spec, ShapesSpec)]


def _where(rng: random.Random, scene: tuple[Spec, ...], index: int) -> str:
    """How the question names a picture: nothing needed for a single one, its place otherwise."""
    if len(scene) == 1:
        return rng.choice(wording.IN_THE_PICTURE)
    return rng.choice(wording.IN_PICTURE).format(nth=wording.ORDINALS[index], n=index + 1)


def ask_number(rng: random.Random, scene: tuple[Spec, ...]) -> Turn | None:
    """The number of one plate."""
    if not (plates := _plates(scene)):
        return None
    index, spec = rng.choice(plates)
    if len(scene) == 1:
        return Turn(rng.choice(wording.NUMBER), str(spec.number), "number")
    question = rng.choice(wording.NUMBER_WHERE).format(where=_where(rng, scene, index))
    return Turn(question, str(spec.number), "number of nth picture")


def ask_which(rng: random.Random, scene: tuple[Spec, ...]) -> Turn | None:
    """The place of the picture that shows a number."""
    plates = _plates(scene)
    if len(scene) < 2 or not plates:
        return None
    index, spec = rng.choice(plates)
    if sum(other.number == spec.number for _, other in plates) > 1:
        return None
    question = rng.choice(wording.WHICH).format(number=spec.number)
    return Turn(question, f"picture {index + 1}", "which picture")


def ask_all(rng: random.Random, scene: tuple[Spec, ...]) -> Turn | None:
    """All numbers, in order."""
    plates = _plates(scene)
    if len(scene) < 2 or len(plates) != len(scene):
        return None
    answer = ", ".join(str(spec.number) for _, spec in plates)
    return Turn(rng.choice(wording.NUMBERS), answer, "all numbers")


def ask_plate_colour(rng: random.Random, scene: tuple[Spec, ...]) -> Turn | None:
    """The colour of a plate or of its digits."""
    if not (plates := _plates(scene)):
        return None
    index, spec = rng.choice(plates)
    where = _where(rng, scene, index)
    if spec.plate_colour is None or rng.random() < 0.4:
        return Turn(rng.choice(wording.INK_COLOUR).format(where=where), spec.ink, "colour")
    return Turn(rng.choice(wording.PLATE_COLOUR).format(where=where), spec.plate_colour, "colour")


def _groups(spec: ShapesSpec) -> Counter[tuple[str, str]]:
    return Counter((item.colour, item.shape) for item in spec.items)


def ask_count(rng: random.Random, scene: tuple[Spec, ...]) -> Turn | None:
    """How many shapes of one colour, of one kind, or in all."""
    if not (found := _shapes(scene)):
        return None
    index, spec = rng.choice(found)
    where = _where(rng, scene, index)
    item = rng.choice(spec.items)
    colour, shape = item.colour, item.shape
    if rng.random() < 0.15:
        colour, shape = rng.choice(COLOUR_NAMES), rng.choice(SHAPES)
    choice = rng.random()
    if choice < 0.5:
        things = wording.plural(f"{colour} {shape}")
        count = _groups(spec)[colour, shape]
    elif choice < 0.75:
        things = wording.plural(shape)
        count = sum(other.shape == shape for other in spec.items)
    else:
        things, count = "shapes", len(spec.items)
    return Turn(
        rng.choice(wording.COUNT).format(things=things, where=where), str(count), "count"
    )


def ask_shape(rng: random.Random, scene: tuple[Spec, ...]) -> Turn | None:
    """The name of a shape that is alone in its picture, or the only kind there."""
    found = [(i, spec) for i, spec in _shapes(scene) if len(spec.items) == 1]
    if not found:
        return None
    index, spec = rng.choice(found)
    where = _where(rng, scene, index)
    return Turn(rng.choice(wording.SHAPE).format(where=where), spec.items[0].shape, "shape")


def ask_shape_colour(rng: random.Random, scene: tuple[Spec, ...]) -> Turn | None:
    """The colour of the only shape, or of the only group with its outline."""
    options = [
        (index, spec, shape, colour)
        for index, spec in _shapes(scene)
        for colour, shape in _groups(spec)
        if len(spec.items) == 1 or [item.shape for item in spec.items].count(shape) == 1
    ]
    if not options:
        return None
    index, spec, shape, colour = rng.choice(options)
    name = rng.choice((shape, "shape")) if len(spec.items) == 1 else shape
    question = rng.choice(wording.SHAPE_COLOUR).format(
        thing=name, where=_where(rng, scene, index)
    )
    return Turn(question, colour, "colour")


def describe(spec: Spec) -> str:
    """The one sentence that describes a picture."""
    background = f"on {wording.article(spec.background)} background."
    if isinstance(spec, ShapesSpec):
        groups = sorted(_groups(spec).items(), key=lambda group: _describing_order(group[0]))
        things = [_counted(count, f"{colour} {shape}") for (colour, shape), count in groups]
        verb = "is" if len(spec.items) == 1 else "are"
        return f"There {verb} {wording.listing(things)} {background}"
    digits = f"the number {spec.number} in {spec.ink} digits"
    if spec.plate_colour is None:
        return f"This is {digits} {background}"
    return f"This is {wording.article(spec.plate_colour)} plate with {digits} {background}"


def _describing_order(group: tuple[str, str]) -> tuple[int, int]:
    return SHAPES.index(group[1]), COLOUR_NAMES.index(group[0])


def _counted(count: int, thing: str) -> str:
    return f"{count} {thing if count == 1 else wording.plural(thing)}"


def ask_description(rng: random.Random, scene: tuple[Spec, ...]) -> Turn | None:
    """The description of one picture."""
    index = rng.randrange(len(scene))
    if len(scene) == 1:
        question = rng.choice(wording.DESCRIBE)
    else:
        question = rng.choice(wording.DESCRIBE_NTH).format(
            nth=wording.ORDINALS[index], n=index + 1
        )
    return Turn(question, describe(scene[index]), "describe")


ASKS: tuple[tuple[Ask, float], ...] = (
    (ask_number, 3.0),
    (ask_which, 1.5),
    (ask_all, 1.0),
    (ask_plate_colour, 0.7),
    (ask_count, 2.5),
    (ask_shape, 1.0),
    (ask_shape_colour, 1.0),
    (ask_description, 2.5),
)
"""Every question about pictures with its weight."""


def scene(rng: random.Random, pictures: int, *, held_out: bool | None) -> tuple[Spec, ...]:
    """Pictures of one request, plates and shapes mixed; `held_out` chooses the numbers (see `draw_number`)."""
    plate_share = rng.choice((0.0, 0.5, 1.0, 1.0))
    return tuple(
        plate_spec(rng, draw_number(rng, held_out=held_out))
        if rng.random() < plate_share
        else shapes_spec(rng, *rng.choice(((1, 1), (1, 6), (3, 6))))
        for _ in range(pictures)
    )


def ask(rng: random.Random, pictures: tuple[Spec, ...], *, show: bool) -> Turn:
    """One question about `pictures`; `show` makes them part of the turn."""
    asks, weights = zip(*ASKS, strict=True)
    while True:
        if (turn := rng.choices(asks, weights)[0](rng, pictures)) is not None:
            question = _as_typed(rng, turn.question)
            return Turn(question, turn.answer, turn.kind, pictures if show else ())


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
    """One to `max_turns` turns. Pictures come with the first; now and then a later one shows a new picture."""
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


def _follow_up(
    rng: random.Random, pictures: tuple[Spec, ...], *, held_out: bool | None
) -> Turn:
    if rng.random() < 0.05:
        return chat_turn(rng)
    if len(pictures) == 1 and rng.random() < 0.1:
        return ask(rng, scene(rng, 1, held_out=held_out), show=True)
    return ask(rng, pictures, show=False)


def training_stream(
    seed: int, *, max_turns: int, max_pictures: int = MAX_PICTURES
) -> Iterator[Conversation]:
    """Endless conversations without a single held-out number."""
    rng = random.Random(f"train-{seed}")
    while True:
        yield conversation(rng, max_turns=max_turns, max_pictures=max_pictures, held_out=False)


def held_out_conversations(n: int, seed: int = 0, max_turns: int = 2) -> Iterator[Conversation]:
    """`n` conversations that training never saw: fresh pictures, every second one with held-out numbers only."""
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
