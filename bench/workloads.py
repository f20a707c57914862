"""What the side-by-side bench asks for: kinds of requests, and new prompts of each kind.

In: a model folder. Out: pictures and text that no server has seen. Knows no server.
"""

from __future__ import annotations

import random
import re
import time
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from bench.accuracy import png
from bench.prompts import PromptMaker
from shared.messages.descriptor import SamplingParams


@dataclass(frozen=True)
class Workload:
    """A kind of request. `prompt_tokens`: of a whole text, or of the question on a picture."""

    key: str
    name: str
    concurrency: int
    prompt_tokens: int
    picture_size: int = 0


WORKLOADS = (
    Workload("text-1", "text, 1 stream", 1, 512),
    Workload("text-8", "text, 8 streams", 8, 512),
    Workload("image-1", "picture, 1 stream", 1, 16, 448),
    Workload("image-8", "picture, 8 streams", 8, 16, 448),
)


def workloads_named(keys: str) -> tuple[Workload, ...]:
    """Those whose keys stand in `keys`, divided by commas, in the table's order."""
    wanted = set(filter(None, keys.split(",")))
    unknown = sorted(wanted - {workload.key for workload in WORKLOADS})
    if unknown or not wanted:
        known = ", ".join(workload.key for workload in WORKLOADS)
        raise ValueError(f"workloads {keys!r}: {', '.join(unknown) or 'none'}; known: {known}")
    return tuple(workload for workload in WORKLOADS if workload.key in wanted)


class Prompts:
    """Unique prompts of an exact length: words that the tokenizer knows as one token each."""

    def __init__(self, model_dir: Path) -> None:
        tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        words = [word for word in tokenizer.get_vocab() if re.fullmatch("\u0120[a-z]{4,9}", word)]
        self._words = sorted(word.replace("\u0120", " ") for word in words)
        request = PromptMaker(model_dir).request([], " the", SamplingParams(max_tokens=1))
        self._overhead = len(request.prompt_token_ids) - 1
        self._rng = random.Random(time.time_ns())  # a fresh seed: nothing has seen these prompts

    def make(self, workload: Workload) -> tuple[list[bytes], str]:
        """Pictures and text of one request."""
        pictures = []
        count = workload.prompt_tokens
        if workload.picture_size:
            pictures.append(_noise(workload.picture_size, self._rng))
        else:
            count -= self._overhead
        return pictures, "".join(self._rng.choices(self._words, k=count))


def _noise(size: int, rng: random.Random) -> bytes:
    from PIL import Image

    coarse = Image.frombytes("RGB", (16, 16), rng.randbytes(16 * 16 * 3))
    return png(coarse.resize((size, size), Image.Resampling.BICUBIC))
