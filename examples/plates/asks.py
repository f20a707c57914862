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
from examples.plates.palette import COLOUR_NAMES
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

    def count(self, spec: Spec) -> int:
        """How many of them a picture shows."""
        items = spec.items if isinstance(spec, ShapesSpec) else ()
        return sum(
            self.colour in (None, item.colour) and self.shape in (None, item.shape)
            for item in items
        )


@dataclass(frozen=True)
class Turn:
    """One question, its only right answer, its kind, the pictures that came with it, and the shapes
    that it counts."""

    question: str
    answer: str
    kind: str
    pictures: tuple[Spec, ...] = ()
    things: Things | None = None


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
    if spec.plate_colour is None or rng.random() < 0.3:
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
        colour, shape = rng.choice(DRAWN_COLOURS), rng.choice(SHAPES)
    choice = rng.random()
    if choice < 0.5:
        things = Things(colour, shape)
    else:
        things = Things(shape=shape) if choice < 0.75 else Things()
    return _count_turn(rng, things, spec, where)


def _count_turn(rng: random.Random, things: Things, spec: Spec, where: str) -> Turn:
    question = rng.choice(wording.COUNT).format(things=things.words, where=where)
    return Turn(question, str(things.count(spec)), "count", things=things)


def ask_absent(rng: random.Random, scene: tuple[Spec, ...]) -> Turn | None:
    """How many shapes there are of a kind that is not there, though one of its colour or of its
    outline is."""
    if not (found := _shapes(scene)):
        return None
    index, spec = rng.choice(found)
    item = rng.choice(spec.items)
    near = [(c, item.shape) for c in DRAWN_COLOURS] + [(item.colour, s) for s in SHAPES]
    colour, shape = rng.choice([kind for kind in near if kind not in _groups(spec)])
    return _count_turn(rng, Things(colour, shape), spec, _where(rng, scene, index))


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
    question = rng.choice(wording.SHAPE_COLOUR).format(thing=name, where=_where(rng, scene, index))
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
        question = rng.choice(wording.DESCRIBE_NTH).format(nth=wording.ORDINALS[index], n=index + 1)
    return Turn(question, describe(scene[index]), "describe")


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
