"""The language model over the new tokens of each running sequence."""

from __future__ import annotations

import time
from collections.abc import Sequence as Sequences
from dataclasses import dataclass

from services.decode.batch import DecodeBatch
from services.decode.plan import StepPlan
from services.decode.sequence import Sequence
from services.decode.speculation import num_accepted
from services.decode.speculator import Speculator
from services.decode.swap import SwapSpace
from shared.cache.kv_cache import KvCache
from shared.model.decoder import LanguageModel
from shared.model.forward_step import ForwardStep
from shared.model.recorded_steps import RecordedSteps
from shared.model.sampler import Sampled, sample


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave each sequence of its batch: one token, and one more per draft token that
    came true. None ends a sequence's tokens where the model's output was not finite."""

    tokens: list[list[Sampled | None]]
    num_drafted: list[int]


class DecodeExecutor:
    """Takes the next step of every sequence of a batch at once.

    `steps` computes those without draft tokens; without it they are recorded, as on a CPU.
    """

    def __init__(
        self,
        model: LanguageModel,
        kv: KvCache,
        *,
        steps: ForwardStep | None = None,
        speculator: Speculator | None = None,
    ) -> None:
        self._model = model
        self._steps = steps or RecordedSteps(model, kv)
        self._kv = kv
        self._batch = DecodeBatch(kv.block_size, kv.device)
        self._swap = SwapSpace(kv)
        self._speculator = speculator

    def step(self, plan: StepPlan) -> StepResult:
        """Copy out, copy back, compute."""
        for save in plan.saves:
            self._swap.save(save)
        for sequence in plan.restores:
            self._swap.restore(sequence)
        if not plan.batch:
            return StepResult([], [])
        if self._speculator is None:
            tokens = [[token] for token in self.run(plan.batch)]
            return StepResult(tokens, [0] * len(tokens))
        return self._speculate(plan.batch, self._speculator)

    def run(self, sequences: Sequences[Sequence]) -> list[Sampled | None]:
        """Write the newest token's KV of each sequence and sample the token after it.

        None where the model's output was not finite.
        """
        logits = self._steps(self._batch.pack(sequences), self._kv)
        return sample(logits, [sequence.state.row() for sequence in sequences])

    def _speculate(self, sequences: Sequences[Sequence], speculator: Speculator) -> StepResult:
        drafts = speculator.draft(sequences, [self._room(sequence) for sequence in sequences])
        started_s = time.perf_counter()
        if drafts is None:
            tokens = [[token] for token in self.run(sequences)]
            num_drafted = [0] * len(tokens)
        else:
            tokens = self._verify(sequences, drafts)
            num_drafted = [len(draft) for draft in drafts]
        speculator.took(len(sequences) + sum(num_drafted), time.perf_counter() - started_s)
        speculator.learn(sequences, num_drafted, [len(each) - 1 for each in tokens])
        return StepResult(tokens, num_drafted)

    def _verify(
        self, sequences: Sequences[Sequence], drafts: list[list[int]]
    ) -> list[list[Sampled | None]]:
        """Sample behind the newest and each draft token, and keep what the plain path would give.

        Every position is drawn from its own logits with its own (seed, index). Up to the first
        draft token that is not what was drawn, these are the very draws of single steps; the KV
        behind it is overwritten by the next step.
        """
        logits = self._model(self._batch.pack(sequences, drafts), self._kv, all_positions=True)
        rows = [
            sequence.state.row(tuple(draft[:offset]))
            for sequence, draft in zip(sequences, drafts, strict=True)
            for offset in range(len(draft) + 1)
        ]
        sampled = sample(logits, rows)
        tokens = []
        start = 0
        for draft in drafts:
            drawn = sampled[start : start + len(draft) + 1]
            ids = [None if each is None else each.token_id for each in drawn]
            tokens.append(drawn[: num_accepted(draft, ids) + 1])
            start += len(drawn)
        return tokens

    def _room(self, sequence: Sequence) -> int:
        """Draft tokens that the answer and the sequence's blocks have room for."""
        num_slots = len(sequence.blocks) * self._kv.block_size
        return min(sequence.num_remaining, num_slots - sequence.kv_len) - 1
