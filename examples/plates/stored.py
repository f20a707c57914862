"""Conversations about pictures whose embeddings are stored, to train the language part alone.

Reading a picture costs the vision tower several times what a question about it costs the language
model. Once the tower knows its pictures, a store of embeddings therefore gives many more questions
in the same time; each picture is asked about again and again, beside ever other ones.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from examples.plates.asks import ASKS, DRILLED
from examples.plates.batches import TextBatch, collate, cut
from examples.plates.encode import (
    ConversationCode,
    Encoder,
    PictureCode,
    encode_picture,
    without_text,
)
from examples.plates.forward import merged, tower
from examples.plates.numbers import draw_number
from examples.plates.questions import MAX_PICTURES, Conversation, ask, chat_turn
from examples.plates.specs import PlateSpec, Spec, plate_spec, shapes_spec

PICTURES_AT_ONCE = 16
MAX_TURNS = 6
ALIKE_TRIES = 24
POOL = 160
"""Conversations that are sorted by length at a time."""


@dataclass(frozen=True)
class StoredPicture:
    """A picture's spec, its code without pixels, and its embedding, `[tokens, width]`."""

    spec: Spec
    code: PictureCode
    embedding: Tensor


class PictureStore:
    """At most `size` pictures; new ones replace the oldest."""

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._rng = random.Random(f"store-{seed}")
        self._plates: list[StoredPicture] = []
        self._shapes: list[StoredPicture] = []
        self._next = 0

    def __len__(self) -> int:
        return len(self._plates) + len(self._shapes)

    @torch.no_grad()
    def add(self, model: Qwen2_5_VLForConditionalGeneration) -> None:
        """Draws and embeds a few more pictures, half plates and half shapes."""
        half = PICTURES_AT_ONCE // 2
        plates = [
            plate_spec(self._rng, draw_number(self._rng, held_out=False)) for _ in range(half)
        ]
        shapes = [shapes_spec(self._rng) for _ in range(half)]
        self._keep(self._plates, plates, model)
        self._keep(self._shapes, shapes, model)
        self._next = (self._next + half) % (self._size // 2)

    def _keep(
        self,
        stored: list[StoredPicture],
        specs: Sequence[Spec],
        model: Qwen2_5_VLForConditionalGeneration,
    ) -> None:
        codes = [encode_picture(spec) for spec in specs]
        batch = collate([without_text(code) for code in codes], pad_id=0)
        visual = model.model.visual
        sizes = [code.grid[0] * code.grid[1] // 4 for code in codes]
        embeddings = torch.split(merged(visual, tower(visual, batch), batch), sizes)
        for offset, (spec, code, embedding) in enumerate(
            zip(specs, codes, embeddings, strict=True)
        ):
            picture = StoredPicture(spec, _bare(code), embedding.clone())
            if len(stored) < self._size // 2:
                stored.append(picture)
            else:
                stored[(self._next + offset) % len(stored)] = picture

    def scene(self, rng: random.Random) -> list[StoredPicture]:
        """Pictures of one request: mostly plates alone (which are then often easily mixed up) or
        shapes alone, sometimes both."""
        kind = rng.random()
        if kind < 0.45:
            count = rng.randint(2, MAX_PICTURES)
            return (
                self._alike(rng, count) if rng.random() < 0.6 else rng.sample(self._plates, count)
            )
        if kind < 0.85:
            return rng.sample(self._shapes, rng.choice((1, 1, 2)))
        both = [*self._plates, *self._shapes]
        return rng.sample(both, rng.randint(1, MAX_PICTURES))

    def _alike(self, rng: random.Random, count: int) -> list[StoredPicture]:
        """A plate and others whose numbers share digits with it."""
        first = rng.choice(self._plates)
        others = sorted(
            rng.sample(self._plates, ALIKE_TRIES), key=lambda other: -_alikeness(first, other)
        )
        return rng.sample([first, *others[: count - 1]], count)


def _bare(code: PictureCode) -> PictureCode:
    """The code without its pixels: a store holds thousands."""
    return PictureCode(code.grid, code.patches[:0], code.hints[:0])


def _alikeness(left: StoredPicture, right: StoredPicture) -> int:
    """Digits in the same place, from the front or from the end, of two different numbers."""
    assert isinstance(left.spec, PlateSpec)
    assert isinstance(right.spec, PlateSpec)
    a, b = str(left.spec.number), str(right.spec.number)
    if a == b:
        return -1
    front = sum(x == y for x, y in zip(a, b, strict=False))
    return front + sum(x == y for x, y in zip(reversed(a), reversed(b), strict=False))


def stored_batches(
    store: PictureStore, encoder: Encoder, pad_id: int, seed: int, batch_tokens: int
) -> Iterator[tuple[TextBatch, Tensor]]:
    """Endless batches of conversations of similar length, each with the embeddings of its picture
    tokens, `[picture tokens, width]`."""
    rng = random.Random(f"stored-{seed}")
    while True:
        made: dict[ConversationCode, list[StoredPicture]] = {}
        for _ in range(POOL):
            chat, scene = _conversation(rng, store)
            made[encoder.encode(chat, [picture.code for picture in scene])] = scene
        batches = list(cut(sorted(made, key=lambda code: len(code.ids)), batch_tokens))
        for codes in rng.sample(batches, len(batches)):
            embeddings = [picture.embedding for code in codes for picture in made[code]]
            yield TextBatch.padded(codes, pad_id), torch.cat(embeddings)


def _conversation(
    rng: random.Random, store: PictureStore
) -> tuple[Conversation, list[StoredPicture]]:
    scene = store.scene(rng)
    specs = tuple(picture.spec for picture in scene)
    choices = DRILLED if rng.random() < 0.7 else ASKS
    turns = [ask(rng, specs, show=True, choices=choices)]
    for _ in range(rng.randint(1, MAX_TURNS - 1)):
        chatter = rng.random() < 0.02
        turns.append(chat_turn(rng) if chatter else ask(rng, specs, show=False, choices=choices))
    return Conversation(tuple(turns)), scene
