"""How long a running answer pauses while the same process prefills a long prompt.

Two servers run side by side, each with one process for all stages: one computes a prompt in
one forward pass, the other in steps of at most so many tokens, with a decode step between two. In
turn, each streams an answer while a prompt of some 4,000 tokens arrives, a new one each time.
Prints the longest gap between two tokens of the stream while that prompt is computed, and their
ratio. The model is the demo model, told to read prompts longer than it was trained for.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import httpx
from rich.progress import track

from bench.client import chat_body, forbid_end, stream
from bench.prompts import PromptMaker
from bench.server import running_server
from shared.demo import model_dir

MAX_CONTEXT_TOKENS = 16_384
SETTING = "TRIPTYCH_MIXED_STEP_TOKENS"
LEAD_S = 0.5
"""How long the answer streams before the prompt is sent."""


@dataclass(frozen=True)
class Round:
    """Seconds: the longest gap while the prompt was computed, a usual gap, the prompt's TTFT."""

    longest_gap_s: float
    usual_gap_s: float
    prompt_s: float


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m bench mixed_worker", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="long prompts of each kind (7)")
    parser.add_argument("--prompt-tokens", type=int, default=4000, help="their length (4000)")
    parser.add_argument("--step-tokens", type=int, default=512, help="tokens of a step (512)")
    parser.add_argument("--answer-tokens", type=int, default=1200, help="the stream's (1200)")
    options = parser.parse_args()
    with ExitStack() as scope:
        folder = Path(scope.enter_context(tempfile.TemporaryDirectory()))
        patient_demo_model(folder)
        urls = {
            step: scope.enter_context(server(folder, step)) for step in (0, options.step_tokens)
        }
        client = scope.enter_context(httpx.Client(timeout=300.0))
        prompts = LongPrompts(PromptMaker(folder), options.prompt_tokens)
        rounds: dict[int, list[Round]] = {step: [] for step in urls}
        for number in track(range(options.rounds + 1), "long prompts"):
            for step, url in urls.items():
                measured = measure(client, url, prompts.next(), options.answer_tokens)
                if number:  # the first of each warms up
                    rounds[step].append(measured)
    print(report(rounds, prompts.num_tokens))


def patient_demo_model(folder: Path) -> None:
    """The demo model with a longer context."""
    shutil.copytree(model_dir(), folder, dirs_exist_ok=True)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["text_config"]["max_position_embeddings"] = MAX_CONTEXT_TOKENS
    path.write_text(json.dumps(config), encoding="utf-8")


@contextmanager
def server(folder: Path, step_tokens: int) -> Iterator[str]:
    """One process for all stages behind a gateway; 0 computes prompts in one pass."""
    os.environ[SETTING] = str(step_tokens)
    os.environ["TRIPTYCH_MAX_BATCH_TOKENS"] = str(MAX_CONTEXT_TOKENS)
    arguments = ["--model", str(folder), "--served-name", "bench", "--topology", "1EPD"]
    try:
        with running_server([*arguments, "--threads", "1"]) as url:
            yield url
    finally:
        os.environ.pop(SETTING, None)


class LongPrompts:
    """Questions of a given length, no two with the same beginning."""

    def __init__(self, maker: PromptMaker, num_tokens: int) -> None:
        self._maker = maker
        self._rng = random.Random(5)
        self.num_tokens = num_tokens

    def next(self) -> str:
        """The next one."""
        text = " ".join(str(self._rng.randrange(10_000)) for _ in range(self.num_tokens))
        tokens = self._maker.tokenizer.encode_text(text)[: self.num_tokens]
        return self._maker.tokenizer.decode(tokens)


def measure(client: httpx.Client, url: str, prompt: str, answer_tokens: int) -> Round:
    """Stream an answer, send the prompt in the middle of it, look at the gaps meanwhile."""
    answer = chat_body(
        "bench",
        [],
        "hello",
        temperature=1.0,
        seed=1,
        max_tokens=answer_tokens,
        logit_bias=forbid_end(model_dir()),
    )
    question = chat_body("bench", [], prompt, temperature=0, max_tokens=1, ignore_eos=True)
    with ThreadPoolExecutor(1) as pool:
        started_s = time.perf_counter()
        streaming = pool.submit(stream, client, url, answer)
        time.sleep(LEAD_S)
        sent_s = time.perf_counter()
        stream(client, url, question)
        answered_s = time.perf_counter()
        timed = streaming.result()
    arrivals_s = list(accumulate(timed.gaps_s, initial=started_s + timed.ttft_s))
    if not arrivals_s[0] < sent_s < answered_s < arrivals_s[-1]:
        raise RuntimeError("the answer was over before the prompt was: raise --answer-tokens")
    gaps = list(pairwise(arrivals_s))
    within = [b - a for a, b in gaps if b > sent_s and a < answered_s]
    outside = [b - a for a, b in gaps if b <= sent_s or a >= answered_s]
    return Round(max(within), statistics.median(outside), answered_s - sent_s)


def report(rounds: dict[int, list[Round]], prompt_tokens: int) -> str:
    """A table with a line for each side, and the ratio of their longest gaps."""
    lines = [f"{'step':<12}{'longest gap':>14}{'usual gap':>12}{'prompt TTFT':>14}   (medians, ms)"]
    longest = {}
    for step, measured in rounds.items():
        longest[step] = statistics.median(each.longest_gap_s for each in measured)
        usual = statistics.median(each.usual_gap_s for each in measured)
        prompt_s = statistics.median(each.prompt_s for each in measured)
        name = f"{step} tokens" if step else "whole prompt"
        lines.append(
            f"{name:<12}{1e3 * longest[step]:>14.1f}{1e3 * usual:>12.1f}{1e3 * prompt_s:>14.1f}"
        )
    whole, stepped = longest.values()
    lines.append(
        f"a prompt of {prompt_tokens} tokens pauses a running answer "
        f"{whole / stepped:.1f} times shorter in steps"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
