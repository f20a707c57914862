"""How long a long prompt's second token takes after its first, by the way its KV travels.

Servers run side by side, each with encode, prefill and decode in processes of their own over a real
NATS and UCX; they differ in `--kv-transfer` only. In turn each answers a prompt of some 4,000
tokens, a new one each time. Compute is real: the demo model, told to read prompts longer than it
was trained for. Prints the gap from the first to the second token of text and the time to the
first, and the ratios of the gaps to that of `whole`; layer-wise comes last.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.progress import track

from bench.client import digits_body, stream
from bench.mixed_worker import MAX_CONTEXT_TOKENS, LongPrompts, patient_demo_model
from bench.prompts import PromptMaker
from bench.server import running_server

WAYS = ("whole", "per-chunk", "layer-wise")
NUM_ANSWER_TOKENS = 8


@dataclass(frozen=True)
class Answered:
    """Seconds to the first token, to the second from there, and of a usual gap after that."""

    ttft_s: float
    second_s: float
    usual_s: float


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m bench kv_transfer", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="long prompts of each kind (7)")
    parser.add_argument("--prompt-tokens", type=int, default=4000, help="their length (4000)")
    parser.add_argument("--chunk-tokens", type=int, default=0, help="tokens of a pass; 0: all (0)")
    options = parser.parse_args()
    with ExitStack() as scope:
        folder = Path(scope.enter_context(tempfile.TemporaryDirectory()))
        patient_demo_model(folder)
        urls = {way: scope.enter_context(server(folder, way, options.chunk_tokens)) for way in WAYS}
        client = scope.enter_context(httpx.Client(timeout=300.0))
        prompts = LongPrompts(PromptMaker(folder), options.prompt_tokens)
        rounds: dict[str, list[Answered]] = {way: [] for way in WAYS}
        for number in track(range(options.rounds + 1), "long prompts"):
            for way, url in urls.items():
                measured = measure(client, url, prompts.next())
                if number:  # the first of each warms up
                    rounds[way].append(measured)
    print(report(rounds, options.prompt_tokens))


@contextmanager
def server(folder: Path, way: str, chunk_tokens: int) -> Iterator[str]:
    """A process for each stage behind a gateway."""
    settings = {
        "TRIPTYCH_KV_TRANSFER": way,
        "TRIPTYCH_CHUNK_TOKENS": str(chunk_tokens),
        "TRIPTYCH_MAX_BATCH_TOKENS": str(MAX_CONTEXT_TOKENS),
    }
    os.environ.update(settings)
    try:
        arguments = ["--model", str(folder), "--served-name", "bench", "--threads", "1"]
        with running_server(arguments) as url:
            yield url
    finally:
        for name in settings:
            os.environ.pop(name, None)


def measure(client: httpx.Client, url: str, prompt: str) -> Answered:
    """Ask one prompt."""
    timed = stream(client, url, digits_body("bench", prompt, NUM_ANSWER_TOKENS))
    if len(timed.gaps_s) < 2:
        raise RuntimeError(f"{timed.num_tokens} tokens came as {timed.text!r}: too few pieces")
    return Answered(timed.ttft_s, timed.gaps_s[0], statistics.median(timed.gaps_s[1:]))


def report(rounds: Mapping[str, Sequence[Answered]], prompt_tokens: int) -> str:
    """A table with a line for each way, and the ratios of their gaps to that of `whole`."""
    lines = [
        f"{'way':<12}{'TTFT':>10}{'to second':>12}{'usual gap':>12}   "
        f"(medians of {len(rounds['whole'])}, ms; prompts of {prompt_tokens} tokens)"
    ]
    second = {}
    for way, measured in rounds.items():
        second[way] = statistics.median(each.second_s for each in measured)
        ttft = statistics.median(each.ttft_s for each in measured)
        usual = statistics.median(each.usual_s for each in measured)
        lines.append(f"{way:<12}{1e3 * ttft:>10.1f}{1e3 * second[way]:>12.1f}{1e3 * usual:>12.1f}")
    lines += [
        f"first to second token, {way} / whole: {second[way] / second['whole']:.2f}"
        for way in WAYS[1:]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
