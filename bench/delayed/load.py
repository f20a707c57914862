"""Open-loop load over HTTP: requests of several kinds at given times, and what became of each.

In: kinds of requests and their arrival times. Out: one `Outcome` per request, errors among them:
none is dropped or tried again. Pictures are all different, so that no cache answers for them.
"""

from __future__ import annotations

import asyncio
import io
import json
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import httpx
import numpy as np
from PIL import Image

from bench.client import chat_body
from bench.delayed.cluster import MODEL
from bench.delayed.profiles import PICTURE_PIXELS
from services.planner.slo import Slo
from services.planner.workload import Shape, poisson

TIMEOUT_S = 300.0
NO_LIMIT = Slo(math.inf, math.inf)


@dataclass(frozen=True, slots=True)
class Kind:
    """A class of requests; `weight` is its share beside the others.

    A picture that is `picture_width` times as wide costs as much as so many pictures, and is one
    task for one encoder. `preface_words` stand in front of the pictures, the other words behind.
    """

    name: str
    num_pictures: int
    prompt_words: int
    answer_tokens: int
    weight: float = 1.0
    slo: Slo = NO_LIMIT
    picture_width: int = 1
    preface_words: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request. Times in seconds; `error` is empty where the answer is whole."""

    kind: Kind
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    latency_s: float = 0.0
    num_tokens: int = 0
    error: str = ""

    @property
    def is_good(self) -> bool:
        """Whether it is whole and within its class's limits."""
        slo = self.kind.slo
        return not self.error and self.ttft_s <= slo.ttft_s and self.tpot_s <= slo.tpot_s


Timetable = Sequence[tuple[float, Kind]]


def poisson_times(
    kinds: Sequence[Kind], *, rate_per_s: float, num_requests: int, seed: int
) -> Timetable:
    """Independent arrivals of a fixed mix."""
    by_name = {kind.name: kind for kind in kinds}
    shapes = [Shape(kind.name, 1, 1, weight=kind.weight) for kind in kinds]
    arrivals = poisson(shapes, rate_per_s=rate_per_s, num_requests=num_requests, seed=seed)
    return [(each.arrival_s, by_name[each.kind]) for each in arrivals]


def send_all(url: str, times: Timetable, *, seed: int) -> list[Outcome]:
    """Send each request at its time, wait for all answers; outcomes in order of arrival."""
    return asyncio.run(_send_all(url, _bodies(times, seed)))


def failures(outcomes: Iterable[Outcome]) -> list[str]:
    """What went wrong."""
    return [each.error for each in outcomes if each.error]


def attainment(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The share of good requests of each class."""
    names = sorted({each.kind.name for each in outcomes})
    return {
        name: statistics.mean(each.is_good for each in outcomes if each.kind.name == name)
        for name in names
    }


def new_picture(draw: np.random.Generator, width: int = 1) -> bytes:
    """A PNG file of coarse noise, unlike any other."""
    coarse = draw.integers(0, 256, (8, 8 * width, 3), dtype=np.uint8)
    size = (PICTURE_PIXELS * width, PICTURE_PIXELS)
    picture = Image.fromarray(coarse).resize(size, Image.Resampling.BOX)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


@dataclass(frozen=True, slots=True)
class _Planned:
    at_s: float
    kind: Kind
    body: dict[str, object]


def _bodies(times: Timetable, seed: int) -> list[_Planned]:
    """All bodies, made before the first is sent."""
    draw = np.random.default_rng(seed)
    planned = []
    for at_s, kind in times:
        pictures = [new_picture(draw, kind.picture_width) for _ in range(kind.num_pictures)]
        preface, words = (
            " ".join(str(n) for n in draw.integers(0, 100, count))
            for count in (kind.preface_words, kind.prompt_words)
        )
        options = {"temperature": 0, "max_tokens": kind.answer_tokens, "ignore_eos": True}
        body = chat_body(MODEL, pictures, words, preface=preface, **options, stream=True)
        planned.append(_Planned(at_s, kind, body))
    return planned


async def _send_all(url: str, planned: Sequence[_Planned]) -> list[Outcome]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=TIMEOUT_S, limits=limits, trust_env=False) as client:
        started_s = time.perf_counter()
        return await asyncio.gather(
            *(_send_at(client, f"{url}/v1/chat/completions", started_s, each) for each in planned)
        )


async def _send_at(
    client: httpx.AsyncClient, url: str, started_s: float, planned: _Planned
) -> Outcome:
    due_s = started_s + planned.at_s
    await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
    try:
        # From when it was due: a client that falls behind must not flatter the server.
        return await _timed(client, url, planned, due_s)
    except (httpx.HTTPError, _Failed) as error:
        return Outcome(planned.kind, error=f"{type(error).__name__}: {error}")


class _Failed(Exception):
    """The server said no, or said less than was asked for."""


async def _timed(client: httpx.AsyncClient, url: str, planned: _Planned, due_s: float) -> Outcome:
    arrivals_s: list[float] = []
    async with client.stream("POST", url, json=planned.body) as response:
        if response.status_code != httpx.codes.OK:
            raise _Failed(f"HTTP {response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                arrivals_s += [time.perf_counter()] * _num_tokens(line)
    if len(arrivals_s) != planned.kind.answer_tokens:
        raise _Failed(f"{len(arrivals_s)} of {planned.kind.answer_tokens} tokens came")
    first_s, last_s = arrivals_s[0] - due_s, arrivals_s[-1] - due_s
    tpot_s = (last_s - first_s) / max(1, len(arrivals_s) - 1)
    return Outcome(planned.kind, first_s, tpot_s, last_s, len(arrivals_s))


def _num_tokens(line: str) -> int:
    """Tokens in an event: a delayed model's token is one character. Raises on an error event."""
    event = json.loads(line.removeprefix("data: "))
    if "error" in event:
        raise _Failed(str(event["error"]))
    return sum(len(choice["delta"].get("content") or "") for choice in event["choices"])
