"""Requests of the demo model for `planner_accuracy`: what is sent, and what it costs.

In: a seed and a rate. Out: chat bodies with new texts and pictures, each with the tokens and
patches that the simulator reckons with.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from bench.accuracy import png
from bench.client import chat_body
from bench.prompts import PromptMaker
from examples.plates.draw import draw
from examples.plates.specs import plate_spec
from services.planner.workload import Arrival, Shape, poisson
from shared.demo import model_dir
from shared.messages.descriptor import SamplingParams

MODEL = "bench"
KINDS = (Shape("text", 1, 24), Shape("image", 1, 12, weight=1.0))
"""Lengths of prompts are those of the real requests."""
NUM_WORDS = 60


@dataclass(frozen=True)
class Request:
    """What is sent, and what it costs."""

    body: dict[str, Any]
    arrival: Arrival

    def at(self, at_s: float) -> Request:
        """The same at another time."""
        return Request(self.body, self.arrival.model_copy(update={"arrival_s": at_s}))


class RequestMaker:
    """New requests, with the tokens and patches that the gateway will count."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)
        self._prompts = PromptMaker(model_dir())

    def make(self, shape: Shape, at_s: float) -> Request:
        """One request of this kind."""
        words = " ".join(str(self._draw.randrange(10_000)) for _ in range(NUM_WORDS))
        pictures: list[bytes] = []
        if shape.kind == "image":
            words = words[:20]
            pictures = [png(draw(plate_spec(self._draw, self._draw.randrange(10_000))))]
        question = f"{words} What number is on the plate?"
        built = self._prompts.request(pictures, question, SamplingParams(max_tokens=1))
        arrival = Arrival.model_validate(
            {
                "arrival_s": at_s,
                "num_prompt_tokens": built.num_tokens,
                "num_output_tokens": shape.num_output_tokens,
                "patches": [t * h * w for t, h, w in (item.grid_thw for item in built.media)],
                "class": shape.kind,
            }
        )
        tokens = shape.num_output_tokens
        body = chat_body(
            MODEL, pictures, question, temperature=0, max_tokens=tokens, ignore_eos=True
        )
        return Request(body, arrival)

    def load(self, num_requests: int, rate_per_s: float) -> list[Request]:
        """Requests at about this rate, at random times, others in each call."""
        kinds = {shape.kind: shape for shape in KINDS}
        seed = self._draw.randrange(1 << 30)
        times = poisson(KINDS, rate_per_s=rate_per_s, num_requests=num_requests, seed=seed)
        return [self.make(kinds[each.kind], each.arrival_s) for each in times]
