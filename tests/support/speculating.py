"""A tiny decode worker without a stage: prompts in, answers out, with or without guesses.

In: a model, prompts with their sampling parameters, a proposer. Out: each answer's tokens, None
where the model's output was not finite, and how many guesses were made and came true.
"""

from __future__ import annotations

from collections.abc import Sequence as Sequences
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from services.decode.executor import DecodeExecutor
from services.decode.plan import StepPlan
from services.decode.sequence import Sequence
from services.decode.speculation import Acceptance, SpeculationPolicy
from services.decode.speculator import Proposal, Proposer, Speculator
from shared.cache.block_pool import BlockPool
from shared.cache.geometry import KvGeometry
from shared.cache.kv_cache import KvCache
from shared.messages.descriptor import RequestDescriptor, SamplingParams, WorkerRef
from shared.messages.events import TokenEvent
from shared.model.batch import ForwardBatch, SequenceInput
from shared.model.decoder import LanguageModel
from shared.model.grammar import Grammars, GrammarState
from shared.model.sampler import sample
from shared.model.sampling_row import SamplingState

BLOCK_SIZE = 4
NUM_BLOCKS = 4096


@dataclass(frozen=True)
class Ask:
    """A prompt and how its answer is sampled."""

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams


class Always(SpeculationPolicy):
    """Guesses as much as there is room for, whether it pays or not."""

    def decide(
        self, states: Sequences[Acceptance], limits: Sequences[int]
    ) -> npt.NDArray[np.int64]:
        return np.clip(np.asarray(limits, dtype=np.int64), 0, self.max_tokens)


class Foreseen:
    """Guesses the answer as it is known to be, with every `wrong_every`th token wrong."""

    def __init__(self, answers: Sequences[Sequences[int | None]], *, wrong_every: int = 4) -> None:
        self._answers = answers
        self._wrong_every = wrong_every

    def propose(self, sequences: Sequences[Sequence], lengths: Sequences[int]) -> Proposal:
        drafts = []
        for sequence, length in zip(sequences, lengths, strict=True):
            answer = self._answers[int(sequence.request_id)]
            start = sequence.next_index
            guesses = [token for token in answer[start : start + length] if token is not None]
            guesses += [7] * (length - len(guesses))  # behind the end, where nothing may come
            drafts.append(
                [
                    token ^ 1 if (start + offset) % self._wrong_every == 0 else token
                    for offset, token in enumerate(guesses)
                ]
            )
        return Proposal(drafts)


@dataclass
class Answers:
    """Tokens by request, a stop token included, and the fate of the guesses."""

    tokens: list[list[int | None]] = field(default_factory=list)
    num_steps: int = 0
    num_drafted: int = 0
    num_accepted: int = 0


class Decoder:
    """One model, its cache and a batch that generates until all answers are complete."""

    def __init__(self, model: LanguageModel, *, grammars: Grammars | None = None) -> None:
        self._model = model
        self._grammars = grammars
        dtype = str(model.dtype).removeprefix("torch.")
        geometry = KvGeometry.of(model.spec, block_size=BLOCK_SIZE, dtype=dtype)
        self._kv = KvCache(geometry, NUM_BLOCKS)
        self._pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE)

    def answer(
        self,
        asks: Sequences[Ask],
        proposer: Proposer | None = None,
        *,
        policy: SpeculationPolicy | None = None,
        num_tokens: int = 5,
    ) -> Answers:
        """All answers, generated together."""
        speculator = Speculator(policy or Always(num_tokens), proposer) if proposer else None
        executor = DecodeExecutor(self._model, self._kv, speculator=speculator)
        sequences = self._prefilled(asks)
        answers = Answers([[sequence.last_token_id] for sequence in sequences])
        while running := [s for s in sequences if not s.retired]:
            result = executor.step(StepPlan(tuple(running)))
            answers.num_steps += 1
            answers.num_drafted += sum(result.num_drafted)
            for sequence, tokens in zip(running, result.tokens, strict=True):
                answers.num_accepted += len(tokens) - 1
                taken = answers.tokens[int(sequence.request_id)]
                for token in tokens:
                    taken.append(None if token is None else token.token_id)
                    if token is None or not isinstance(sequence.append(token)[-1], TokenEvent):
                        sequence.retired = True
                        sequence.blocks.free()
                        break
        assert self._pool.num_used == 0
        return answers

    def _prefilled(self, asks: Sequences[Ask]) -> list[Sequence]:
        requests = [_request(number, ask) for number, ask in enumerate(asks)]
        handles = [self._pool.allocate(-(-r.max_context_tokens // BLOCK_SIZE)) for r in requests]
        first = [
            sample(
                self._model(
                    ForwardBatch.pack([_input(ask, handle.block_ids)], BLOCK_SIZE), self._kv
                ),
                [SamplingState.of(request, self._grammar(request)).row()],
            )[0]
            for ask, request, handle in zip(asks, requests, handles, strict=True)
        ]
        made = []
        for request, handle, token in zip(requests, handles, first, strict=True):
            assert token is not None
            made.append(
                Sequence(
                    request_id=request.request_id,
                    attempt=0,
                    gateway=request.gateway,
                    sampling=request.sampling,
                    state=SamplingState.of(
                        request, self._grammar(request, token.token_id), token.token_id
                    ),
                    blocks=handle,
                    kv_len=request.num_tokens,
                    next_pos=request.num_tokens,
                    last_token_id=token.token_id,
                    next_index=1,
                    history=[*request.prompt_token_ids, token.token_id],
                )
            )
        return made

    def _grammar(self, request: RequestDescriptor, *newer_ids: int) -> GrammarState | None:
        return None if self._grammars is None else self._grammars.open(request, *newer_ids)


def _request(number: int, ask: Ask) -> RequestDescriptor:
    return RequestDescriptor(
        request_id=str(number),
        attempt=0,
        created_unix_s=0.0,
        gateway=WorkerRef(name="g", incarnation=1),
        model="m",
        prompt_token_ids=ask.prompt_ids,
        sampling=ask.sampling,
        deadline_unix_s=2e9,
    )


def _input(ask: Ask, block_ids: Sequences[int]) -> SequenceInput:
    return SequenceInput(ask.prompt_ids, range(len(ask.prompt_ids)), block_ids)
