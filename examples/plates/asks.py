"""Questions about pictures, each with exactly one right answer.

An `ask_` function looks at the pictures of a request and gives a question, or None where it would
have no single right answer.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from examples.plates import wording
from examples.plates.specs import DRAWN_COLOURS, SHAPES, PlateSpec, ShapesSpec, Spec


@dataclass(frozen=True)
class Things:
    """Shapes that a question counts: of one colour, of one outline, or any (None)."""

    colour: str | None = None
    shape: str | None = None

    @property
    def words(self) -> str:
        """Their name in a question, in the plural."""
        names = (self.colour, self.shape or "shape")
        return wording.plural(" ".join(name for name in names if name is not None))

    def among(self, spec: ShapesSpec) -> tuple[int, ...]:
        """Which items of a picture they are."""
        return tuple(
            place
            for place, item in enumerate(spec.items)
            if self.colour in (None, item.colour) and self.shape in (None, item.shape)
        )


@dataclass(frozen=True)
class Look:
    """Where one sees what an answer says from character `begin` to `end`: in one of the question's
    pictures, at these of its marks (digits or shapes), or all over it if there are none.

    counts: the answer says how many marks those are.
    """

    begin: int
    end: int
    picture: int
    marks: tuple[int, ...] = ()
    counts: bool = False


@dataclass(frozen=True)
class Turn:
    """One question, its only right answer, its kind, the pictures that came with it, and where the
    answer is to be seen in the pictures asked about."""

    question: str
    answer: str
    kind: str
    pictures: tuple[Spec, ...] = ()
    looks: tuple[Look, ...] = ()


class Answer:
    """An answer that is put together from parts, with where each is to be seen."""

    def __init__(self) -> None:
        self.text = ""
        self.looks: list[Look] = []

    def say(self, text: str, picture: int, marks: tuple[int, ...] = ()) -> Answer:
        """Adds a part that is seen in a picture, at these marks of it or all over it."""
        self._add(text, picture, marks, counts=False)
        return self

    def count(self, picture: int, marks: tuple[int, ...]) -> Answer:
        """Adds the number of these marks."""
        self._add(str(len(marks)), picture, marks, counts=True)
        return self

    def _add(self, text: str, picture: int, marks: tuple[int, ...], *, counts: bool) -> None:
        end = len(self.text) + len(text)
        self.looks.append(Look(len(self.text), end, picture, marks, counts))
        self.text += text

    def spell(self, number: int, picture: int) -> Answer:
        """Adds the digits of a plate, one mark each."""
        for place, digit in enumerate(str(number)):
            self.say(digit, picture, (place,))
        return self

    def to(self, question: str, kind: str) -> Turn:
        """The turn with this answer to a question."""
        return Turn(question, self.text, kind, looks=tuple(self.looks))


Ask = Callable[[random.Random, tuple[Spec, ...]], Turn | None]
"""Asks about the pictures of a request, or gives None where its question would have no single right
answer."""


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
    answer = Answer().spell(spec.number, index)
    if len(scene) == 1:
        return answer.to(rng.choice(wording.NUMBER), "number")
    question = rng.choice(wording.NUMBER_WHERE).format(where=_where(rng, scene, index))
    return answer.to(question, "number of nth picture")


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
    answer = Answer()
    for index, spec in plates:
        answer.spell(spec.number, index)
        if index < len(scene) - 1:
            answer.say(", ", index, (len(str(spec.number)) - 1,))
    return answer.to(rng.choice(wording.NUMBERS), "all numbers")


def ask_plate_colour(rng: random.Random, scene: tuple[Spec, ...]) -> Turn | None:
    """The colour of a plate or of its digits."""
    if not (plates := _plates(scene)):
        return None
    index, spec = rng.choice(plates)
    where = _where(rng, scene, index)
    if spec.plate_colour is None or rng.random() < 0.3:
        question = rng.choice(wording.INK_COLOUR).format(where=where)
        return Answer().say(spec.ink, index).to(question, "colour")
    question = rng.choice(wording.PLATE_COLOUR).format(where=where)
    return Answer().say(spec.plate_colour, index).to(question, "colour")


def _groups(spec: ShapesSpec) -> Counter[tuple[str, str]]:
    return Counter((item.colour, item.shape) for item in spec.items)


def ask_count(rng: random.Random, scene: tuple[Spec, ...]) -> Turn | None:
    """How many shapes of one colour, of one kind, or in all."""
    if not (found := _shapes(scene)):
        return None
    index, spec = rng.choice(found)
    item = rng.choice(spec.items)
    colour, shape = item.colour, item.shape
    if rng.random() < 0.15:
        colour, shape = rng.choice(DRAWN_COLOURS), rng.choice(SHAPES)
    choice = rng.random()
    if choice < 0.5:
        things = Things(colour, shape)
    else:
        things = Things(shape=shape) if choice < 0.75 else Things()
    return _count_turn(rng, things, scene, index)


def _count_turn(rng: random.Random, things: Things, scene: tuple[Spec, ...], index: int) -> Turn:
    spec = scene[index]
    assert isinstance(spec, ShapesSpec)
    where = _where(rng, scene, index)
    question = rng.choice(wording.COUNT).format(things=things.words, where=where)
    found = things.among(spec)
    return Answer().count(index, found).to(question, "count")


def ask_absent(rng: random.Random, scene: tuple[Spec, ...]) -> Turn | None:
    """How many shapes there are of a kind that is not there, though one of its colour or of its
    outline is."""
    if not (found := _shapes(scene)):
        return None
    index, spec = rng.choice(found)
    item = rng.choice(spec.items)
    near = [(c, item.shape) for c in DRAWN_COLOURS] + [(item.colour, s) for s in SHAPES]
    colour, shape = rng.choice([kind for kind in near if kind not in _groups(spec)])
    return _count_turn(rng, Things(colour, shape), scene, index)


def ask_shape(rng: random.Random, scene: tuple[Spec, ...]) -> Turn | None:
    """The name of a shape that is alone in its picture, or the only kind there."""
    found = [(i, spec) for i, spec in _shapes(scene) if len(spec.items) == 1]
    if not found:
        return None
    index, spec = rng.choice(found)
    question = rng.choice(wording.SHAPE).format(where=_where(rng, scene, index))
    return Answer().say(spec.items[0].shape, index, (0,)).to(question, "shape")


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
    question = rng.choice(wording.SHAPE_COLOUR).format(thing=name, where=_where(rng, scene, index))
    return Answer().say(colour, index, Things(colour, shape).among(spec)).to(question, "colour")


def describe(spec: Spec, index: int = 0) -> Answer:
    """The one sentence that describes a picture, the `index`-th of the question's."""
    answer = Answer()
    if isinstance(spec, ShapesSpec):
        groups = _groups(spec)
        answer.say("There is" if len(spec.items) == 1 else "There are", index)
        for place, (colour, shape) in enumerate(spec.kinds):
            count, seen = groups[colour, shape], Things(colour, shape).among(spec)
            name = f"{colour} {shape}" if count == 1 else wording.plural(f"{colour} {shape}")
            answer.say(" and " if place else " ", index, seen)
            answer.count(index, seen).say(f" {name}", index, seen)
    else:
        answer.say("This is ", index)
        if spec.plate_colour is not None:
            answer.say(f"{wording.article(spec.plate_colour)} plate with ", index)
        answer.say("the number ", index).spell(spec.number, index)
        answer.say(f" in {spec.ink} digits", index)
    return answer.say(f" on {wording.article(spec.background)} background.", index)


def ask_description(rng: random.Random, scene: tuple[Spec, ...]) -> Turn | None:
    """The description of one picture."""
    index = rng.randrange(len(scene))
    if len(scene) == 1:
        question = rng.choice(wording.DESCRIBE)
    else:
        question = rng.choice(wording.DESCRIBE_NTH).format(nth=wording.ORDINALS[index], n=index + 1)
    return describe(scene[index], index).to(question, "describe")


ASKS: tuple[tuple[Ask, float], ...] = (
    (ask_number, 3.0),
    (ask_which, 2.0),
    (ask_all, 1.0),
    (ask_plate_colour, 0.7),
    (ask_count, 2.5),
    (ask_shape, 1.0),
    (ask_shape_colour, 1.0),
    (ask_description, 1.2),
)
"""Every question about pictures with its weight."""
DRILLED: tuple[tuple[Ask, float], ...] = (
    (ask_count, 4.0),
    (ask_absent, 2.0),
    (ask_which, 1.0),
    (ask_all, 1.0),
    (ask_description, 1.0),
)
"""The questions that are learned last, with their weights in a drill."""
