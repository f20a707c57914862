"""Decoding with guesses from the text itself against plain decoding, in this process.

Three texts: rows of a table, which a grammar makes repeat themselves whatever the model knows; the
model's greedy answers; and answers sampled at a high temperature, where hardly anything comes back
and the policy should stop guessing. Both ways in turn, round by round; the tokens must be equal.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence as Sequences
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from services.decode.executor import DecodeExecutor
from services.decode.plan import StepPlan
from services.decode.sequence import Sequence
from services.decode.speculation import SpeculationPolicy
from services.decode.speculator import NgramProposer, Speculator
from shared.cache.block_pool import BlockPool
from shared.cache.geometry import KvGeometry
from shared.cache.kv_cache import KvCache
from shared.demo import model_dir
from shared.messages.descriptor import GrammarSpec, RequestDescriptor, SamplingParams, WorkerRef
from shared.messages.events import FailedEvent
from shared.model.batch import ForwardBatch, SequenceInput
from shared.model.grammar import Grammars
from shared.model.loader import load_language_model
from shared.model.sampler import sample
from shared.model.sampling_row import SamplingState
from shared.modelspec import ModelSpec

BLOCK_SIZE = 16
NUM_PROMPT_TOKENS = 32
GATEWAY = WorkerRef(name="bench", incarnation=1)
TABLE = GrammarSpec(kind="regex", text=r"(\| plate \| number \| colour \|\n)+")
TEXTS = {
    "repetitive": SamplingParams(temperature=0.0, grammar=TABLE),
    "greedy": SamplingParams(temperature=0.0),
    "random": SamplingParams(temperature=2.0),
}


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m bench speculation", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="rounds of both ways (7)")
    parser.add_argument("--batch", type=int, default=1, help="answers at the same time (1)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of an answer (256)")
    parser.add_argument("--drafts", type=int, default=5, help="tokens guessed at most (5)")
    parser.add_argument("--model", type=Path, default=model_dir(), help="model folder (demo)")
    parser.add_argument("--dtype", default="float32", help="float64, float32, bfloat16 (float32)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    decoder = Decoder(options.model, options.dtype, options.batch, options.tokens)
    for text, sampling in TEXTS.items():
        print(compare(decoder, text, sampling, options.drafts, options.rounds))


@dataclass(frozen=True)
class Run:
    """One generation of a batch: its tokens, and what became of the guesses."""

    answers: list[list[int]]
    took_s: float
    num_steps: int
    num_drafted: int
    num_accepted: int

    @property
    def tokens_per_s(self) -> float:
        return sum(map(len, self.answers)) / self.took_s


class Decoder:
    """A model and as many prompts of random tokens as the batch is large."""

    def __init__(self, folder: Path, dtype: str, batch: int, num_tokens: int) -> None:
        spec = ModelSpec.load(folder)
        self._model = load_language_model(folder, spec, dtype=dtype)
        geometry = KvGeometry.of(spec.text, block_size=BLOCK_SIZE, dtype=dtype)
        self._width = geometry.blocks_for(NUM_PROMPT_TOKENS + num_tokens)
        self._grammars = Grammars(folder, spec)
        self._kv = KvCache(geometry, self._width * batch)
        self._num_tokens = num_tokens
        rng = np.random.default_rng(0)
        shape = (batch, NUM_PROMPT_TOKENS)
        self._prompts: list[list[int]] = rng.integers(0, spec.text.vocab_size, shape).tolist()

    def run(self, sampling: SamplingParams, speculator: Speculator | None) -> Run:
        """Prefill, then time the steps to the end of all answers."""
        executor = DecodeExecutor(self._model, self._kv, speculator=speculator)
        pool = BlockPool(self._kv.num_blocks, BLOCK_SIZE)
        sequences = [
            self._prefilled(self._request(sampling, seed, prompt), pool)
            for seed, prompt in enumerate(self._prompts)
        ]
        num_steps = num_drafted = num_accepted = 0
        started_s = time.perf_counter()
        while running := tuple(each for each in sequences if each.num_remaining):
            result = executor.step(StepPlan(running))
            num_steps += 1
            num_drafted += sum(result.num_drafted)
            num_accepted += sum(len(tokens) - 1 for tokens in result.tokens)
            for sequence, tokens in zip(running, result.tokens, strict=True):
                for token in tokens:
                    if token is None:
                        raise SystemExit("the model's output is not finite")
                    told = sequence.append(token)[-1]
                    if isinstance(told, FailedEvent):
                        raise SystemExit(told.message)
        took_s = time.perf_counter() - started_s
        answers = [each.history[NUM_PROMPT_TOKENS:] for each in sequences]
        return Run(answers, took_s, num_steps, num_drafted, num_accepted)

    def _request(self, sampling: SamplingParams, seed: int, prompt: list[int]) -> RequestDescriptor:
        changes = {"seed": seed, "max_tokens": self._num_tokens}
        return RequestDescriptor(
            request_id=f"bench-{seed}",
            attempt=0,
            gateway=GATEWAY,
            model="bench",
            prompt_token_ids=tuple(prompt),
            sampling=sampling.model_copy(update=changes),
            created_unix_s=0.0,
            deadline_unix_s=math.inf,
        )

    def _prefilled(self, request: RequestDescriptor, pool: BlockPool) -> Sequence:
        prompt, blocks = request.prompt_token_ids, pool.allocate(self._width)
        inputs = SequenceInput(prompt, range(len(prompt)), blocks.block_ids)
        logits = self._model(ForwardBatch.pack([inputs], BLOCK_SIZE), self._kv)
        (first,) = sample(logits, [SamplingState.of(request, self._grammars.open(request)).row()])
        if first is None:
            raise SystemExit("the model's output is not finite")
        grammar = self._grammars.open(request, first.token_id)
        return Sequence(
            request_id=request.request_id,
            attempt=0,
            gateway=GATEWAY,
            sampling=request.sampling,
            state=SamplingState.of(request, grammar, first.token_id),
            blocks=blocks,
            kv_len=len(prompt),
            next_pos=len(prompt),
            last_token_id=first.token_id,
            next_index=1,
            history=[*prompt, first.token_id],
        )


def compare(decoder: Decoder, text: str, sampling: SamplingParams, drafts: int, rounds: int) -> str:
    """Both ways in turn; a paragraph of figures."""
    policy = SpeculationPolicy(drafts)  # a worker has one for as long as it lives
    plain: list[Run] = []
    guessed: list[Run] = []
    for _ in range(rounds + 1):
        plain.append(decoder.run(sampling, None))
        guessed.append(decoder.run(sampling, Speculator(policy, NgramProposer())))
        if plain[-1].answers != guessed[-1].answers:
            raise SystemExit(f"{text}: the tokens with guesses are not those without")
    plain, guessed = plain[1:], guessed[1:]  # the first round warms up
    ratios = [b.tokens_per_s / a.tokens_per_s for a, b in zip(plain, guessed, strict=True)]
    drafted, accepted = (
        sum(run.num_drafted for run in guessed),
        sum(run.num_accepted for run in guessed),
    )
    return (
        f"{text} text, answers equal\n"
        f"  plain    {_median_rate(plain):9.0f} tokens/s  {plain[-1].num_steps:6d} steps\n"
        f"  guessing {_median_rate(guessed):9.0f} tokens/s  {guessed[-1].num_steps:6d} steps\n"
        f"  accepted {accepted} of {drafted} guesses ({accepted / max(drafted, 1):.0%}), "
        f"{drafted / sum(run.num_steps for run in guessed):.2f} guesses a step\n"
        f"  ratio    {statistics.median(ratios):9.2f} (rounds {min(ratios):.2f} to "
        f"{max(ratios):.2f})"
    )


def _median_rate(runs: Sequences[Run]) -> float:
    return statistics.median(run.tokens_per_s for run in runs)


if __name__ == "__main__":
    main()
