"""Mixed requests: text and pictures of many sizes, greedy and seeded, as HTTP bodies and as the
engine's own descriptors."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image

from bench.accuracy import png
from bench.client import chat_body
from bench.prompts import PromptMaker
from examples.plates.draw import draw
from examples.plates.specs import plate_spec, shapes_spec
from services.local_engine import LocalEngine
from shared.messages.descriptor import SamplingParams

QUESTIONS = (
    "What number is on the plate?",
    "What is in the picture?",
    "How many shapes are there?",
    "Which picture shows 57?",
    "Describe the picture.",
    "hello",
)


@dataclass(frozen=True)
class Mixed:
    """One request: `preface`, pictures, question.

    `sampling` has no stop tokens: every answer has `max_tokens` tokens.
    """

    pictures: tuple[bytes, ...]
    question: str
    sampling: SamplingParams
    preface: str = ""

    @property
    def is_greedy(self) -> bool:
        """Whether transformers' own greedy generation must give the same tokens."""
        return self.sampling.temperature == 0

    def body(self, model: str) -> dict[str, Any]:
        """The request as a client sends it."""
        sampling = self.sampling
        return chat_body(
            model,
            self.pictures,
            self.question,
            preface=self.preface,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=sampling.seed,
            max_tokens=sampling.max_tokens,
            ignore_eos=True,
            return_token_ids=True,
        )


def mixed_requests(count: int, seed: int) -> Iterator[Mixed]:
    """A quarter text, the rest 1 to 4 pictures; half greedy, half sampled in several ways."""
    rng = random.Random(seed)
    for _ in range(count):
        pictures = tuple(_picture(rng) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 3, 4))))
        yield Mixed(pictures, rng.choice(QUESTIONS), _sampling(rng))


def mixed_rounds(count: int, seed: int) -> Iterator[list[Mixed]]:
    """New requests in every round, without an end."""
    for number in itertools.count():
        yield list(mixed_requests(count, seed + 1000 * number))


def _picture(rng: random.Random) -> bytes:
    drawn = draw(rng.choice((plate_spec(rng, rng.randrange(10_000)), shapes_spec(rng))))
    width, height = (rng.randrange(40, 400) for _ in range(2))
    return png(drawn if rng.random() < 0.5 else drawn.resize((width, height), Image.BICUBIC))


def _sampling(rng: random.Random) -> SamplingParams:
    max_tokens = rng.randrange(4, 25)
    if rng.random() < 0.5:
        return SamplingParams(temperature=0.0, max_tokens=max_tokens)
    return SamplingParams(
        temperature=rng.choice((0.5, 1.0, 1.5)),
        top_k=rng.choice((0, 0, 5, 50)),
        top_p=rng.choice((1.0, 1.0, 0.9, 0.5)),
        seed=rng.randrange(2**32),
        max_tokens=max_tokens,
    )


def tokens_of(request: Mixed, engine: LocalEngine, prompts: PromptMaker) -> list[int]:
    """What one process answers when it is asked nothing else."""
    descriptor = prompts.request(
        request.pictures, request.question, request.sampling, preface=request.preface
    )
    return list(engine.generate(descriptor, request.pictures))
