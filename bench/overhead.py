"""What the distributed path costs: TTFT and time per token against the same engine in one process.

Starts every service (gateway, encoder, prefill, decode as processes of their own, nats-server, UCX)
and, in this process, the same executors called one after the other without bus or transport. Both
answer the same prompts in turn, round by round, with pictures that neither has seen. Prints
medians, their difference, and where the pipeline's time to the first token goes by its own spans.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import httpx
import torch
from rich.progress import track

from bench.accuracy import png
from bench.client import NEVER, Timed, chat_body, forbid_end, stream
from bench.prompts import PromptMaker
from bench.server import running_server
from examples.plates.draw import draw
from examples.plates.specs import plate_spec
from services.local_engine import LocalEngine
from shared.demo import model_dir
from shared.messages.descriptor import SamplingParams
from shared.modelspec import ModelSpec
from shared.runtime.host import ModelFolder

QUESTION = "What number is on the plate?"
TEXT_QUESTION = "What can you do?"


@dataclass(frozen=True)
class Case:
    """A kind of request."""

    name: str
    num_pictures: int


CASES = (Case("text", 0), Case("one picture", 1), Case("four pictures", 4))


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m bench overhead", description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="requests of each kind (30)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each answer (32)")
    parser.add_argument("--model", type=Path, default=model_dir(), help="model folder (demo)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    spec = ModelSpec.load(options.model)
    folder = ModelFolder(options.model, spec, spec.dtype, "cpu")
    local = LocalSide(folder, options.tokens)
    arguments = ["--model", str(options.model), "--served-name", "bench"]
    with running_server(arguments) as url, httpx.Client(timeout=120.0) as client:
        remote = RemoteSide(client, url, options.tokens, options.model)
        for case in CASES:
            print(compare(case, local, remote, options.rounds))


class LocalSide:
    """The engine in this process."""

    def __init__(self, folder: ModelFolder, num_tokens: int) -> None:
        self._engine = LocalEngine(folder)
        self._prompts = PromptMaker(folder.directory)
        self._num_tokens = num_tokens
        self._bias = tuple((token, NEVER) for token in folder.spec.eos_token_ids)

    def ask(self, pictures: Sequence[bytes], question: str) -> tuple[float, list[float]]:
        """TTFT and gaps in seconds; starts from the picture files, as the gateway does."""
        started_s = time.perf_counter()
        sampling = SamplingParams(
            temperature=0.0, max_tokens=self._num_tokens, logit_bias=self._bias
        )
        request = self._prompts.request(pictures, question, sampling)
        arrivals_s = []
        for _ in self._engine.generate(request, pictures):
            arrivals_s.append(time.perf_counter())
        gaps_s = [b - a for a, b in pairwise(arrivals_s)]
        return arrivals_s[0] - started_s, gaps_s


class RemoteSide:
    """The pipeline over HTTP."""

    def __init__(self, client: httpx.Client, url: str, num_tokens: int, folder: Path) -> None:
        self._client = client
        self._url = url
        self._num_tokens = num_tokens
        self._bias = forbid_end(folder)

    def ask(self, pictures: Sequence[bytes], question: str) -> Timed:
        """One streamed answer."""
        body = chat_body(
            "bench",
            pictures,
            question,
            temperature=0,
            max_tokens=self._num_tokens,
            logit_bias=self._bias,
        )
        return stream(self._client, self._url, body)

    def spans(self, trace_id: str) -> dict[str, float]:
        """Milliseconds per span name of one request (the longest where a name repeats)."""
        found: dict[str, float] = defaultdict(float)
        for span in self._client.get(f"{self._url}/v1/traces/{trace_id}").json():
            took_ms = (span["end_unix_ns"] - span["start_unix_ns"]) / 1e6
            found[span["name"]] = max(found[span["name"]], took_ms)
        return found


def compare(case: Case, local: LocalSide, remote: RemoteSide, rounds: int) -> str:
    """Both sides in turn on the same prompts; a paragraph of figures."""
    rng = random.Random(case.name)
    ours_ttft, ours_gap, base_ttft, base_gap = [], [], [], []
    traces = []
    for number in track(range(rounds + 3), case.name):
        pictures = [
            png(draw(plate_spec(rng, rng.randrange(10_000)))) for _ in range(case.num_pictures)
        ]
        question = QUESTION if pictures else TEXT_QUESTION
        ttft_s, gaps_s = local.ask(pictures, question)
        timed = remote.ask(pictures, question)
        if number < 3:  # warm-up of both sides
            continue
        base_ttft.append(ttft_s)
        base_gap.append(statistics.mean(gaps_s))
        ours_ttft.append(timed.ttft_s)
        ours_gap.append(sum(timed.gaps_s) / max(1, timed.num_tokens - 1))
        traces.append(timed.trace_id)
    time.sleep(0.5)  # the last spans are on their way
    return _paragraph(
        case,
        [1e3 * statistics.median(v) for v in (base_ttft, ours_ttft, base_gap, ours_gap)],
        [remote.spans(trace) for trace in traces],
    )


def _paragraph(case: Case, medians_ms: list[float], spans: list[dict[str, float]]) -> str:
    base_ttft, ours_ttft, base_gap, ours_gap = medians_ms
    names = sorted({name for each in spans for name in each})
    parts = {n: statistics.median([each.get(n, 0.0) for each in spans]) for n in names}
    where = ", ".join(f"{name} {ms:.1f}" for name, ms in parts.items())
    return (
        f"{case.name}\n"
        f"  TTFT       one process {base_ttft:7.2f} ms   pipeline {ours_ttft:7.2f} ms   "
        f"added {ours_ttft - base_ttft:6.2f} ms   ratio {ours_ttft / base_ttft:.2f}\n"
        f"  per token  one process {base_gap:7.2f} ms   pipeline {ours_gap:7.2f} ms   "
        f"added {ours_gap - base_gap:6.2f} ms   ratio {ours_gap / base_gap:.2f}\n"
        f"  spans (median ms): {where}"
    )


if __name__ == "__main__":
    main()
