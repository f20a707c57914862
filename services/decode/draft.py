"""Drafts from a smaller model that reads the same tokens.

In: sequences and how many tokens to guess for each. Out: the smaller model's own continuation,
drawn with the random numbers that the target will draw with: where the two distributions are
close, both pick the same token. It sees text only; a picture's placeholders are tokens like others
to it. Its cache is its own, and a sequence that finds no room there is not guessed for.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Sequences
from dataclasses import dataclass, field, replace

import torch

from services.decode.sequence import Sequence
from services.decode.speculation import num_accepted
from services.decode.speculator import Proposal
from shared.cache.block_pool import BlockHandle, BlockPool
from shared.cache.kv_cache import KvCache
from shared.errors import OutOfBlocks
from shared.model.batch import ForwardBatch, SequenceInput
from shared.model.decoder import LanguageModel
from shared.model.sampler import SamplingRow, sample

CATCH_UP_TOKENS = 512
"""Tokens of prompts that are read in one step, beside those that all sequences generate: a long
prompt is read over several steps, in which the target goes on without its drafts."""


@dataclass(eq=False)
class _Reader:
    """How far the smaller model has read one sequence.

    The first `num_read` tokens of the history are in its cache, and behind them `guessed`, of
    which what came true will turn out to be history.
    """

    blocks: BlockHandle
    num_read: int = 0
    guessed: list[int] = field(default_factory=list)

    def settle(self, history: Sequences[int]) -> None:
        """Keep of the guesses in the cache what came true."""
        came_true = num_accepted(self.guessed, history[self.num_read :])
        # The newest token is always read anew: the next one is drawn from its logits.
        self.num_read = min(self.num_read + came_true, len(history) - 1)
        self.guessed = []


class DraftModel:
    """A `Proposer` with a language model. Used by the compute thread only."""

    def __init__(
        self,
        model: LanguageModel,
        kv: KvCache,
        *,
        num_target_tokens: int,
    ) -> None:
        self._model = model
        self._kv = kv
        self._pool = BlockPool(kv.num_blocks, kv.block_size, name="draft KV")
        self._num_target_tokens = num_target_tokens
        self._readers: dict[Sequence, _Reader] = {}

    def propose(self, sequences: Sequences[Sequence], lengths: Sequences[int]) -> Proposal:
        self._forget_retired()
        wanted = dict(zip(sequences, lengths, strict=True))
        drafts: dict[Sequence, list[int]] = {sequence: [] for sequence in sequences}
        ready = [s for s, length in wanted.items() if length and self._has_room(s, length)]
        active = self._draw(*self._read_history(ready), drafts, wanted)
        num_timed, started_s = 0, time.perf_counter()
        while active:
            num_timed += len(active)
            active = self._draw(active, self._read_guesses(active, drafts), drafts, wanted)
        timed_s = time.perf_counter() - started_s
        return Proposal(list(drafts.values()), num_timed, timed_s)

    def _forget_retired(self) -> None:
        for sequence in [s for s in self._readers if s.retired]:
            self._readers.pop(sequence).blocks.free()

    def _has_room(self, sequence: Sequence, length: int) -> bool:
        """Own the blocks for the history and the guesses behind it, if they are there."""
        if not sequence.history:
            return False
        reader = self._readers.get(sequence)
        if reader is None:
            reader = self._readers[sequence] = _Reader(self._pool.allocate(0))
        reader.settle(sequence.history)
        needed = self._kv.geometry.blocks_for(len(sequence.history) + length)
        try:
            reader.blocks.grow(max(0, needed - len(reader.blocks)))
        except OutOfBlocks:
            return False
        return True

    def _read_history(
        self, sequences: Sequences[Sequence]
    ) -> tuple[list[Sequence], torch.Tensor | None]:
        """Read what the cache lacks; the sequences that are read to their end, and their logits."""
        budget = CATCH_UP_TOKENS + len(sequences)
        inputs, at_end, rows = [], [], []
        for sequence in sequences:
            reader = self._readers[sequence]
            unread = sequence.history[reader.num_read : reader.num_read + budget]
            if not unread:
                break
            budget -= len(unread)
            inputs.append(_input(reader, unread, reader.num_read))
            reader.num_read += len(unread)
            if reader.num_read == len(sequence.history):
                at_end.append(sequence)
                rows.append(len(inputs) - 1)
        logits = self._forward(inputs)
        return at_end, logits if logits is None else logits[rows]

    def _read_guesses(
        self, sequences: Sequences[Sequence], drafts: dict[Sequence, list[int]]
    ) -> torch.Tensor | None:
        """Read the newest guess of each sequence; logits `[num_sequences, vocab]`."""
        inputs = []
        for sequence in sequences:
            reader, guess = self._readers[sequence], drafts[sequence][-1]
            inputs.append(_input(reader, [guess], reader.num_read + len(reader.guessed)))
            reader.guessed.append(guess)
        return self._forward(inputs)

    def _forward(self, inputs: list[SequenceInput]) -> torch.Tensor | None:
        if not inputs:
            return None
        batch = ForwardBatch.pack(inputs, self._kv.block_size, device=self._kv.device)
        logits: torch.Tensor = self._model(batch, self._kv)
        return logits

    def _draw(
        self,
        sequences: list[Sequence],
        logits: torch.Tensor | None,
        drafts: dict[Sequence, list[int]],
        wanted: dict[Sequence, int],
    ) -> list[Sequence]:
        """Guess one more token of each sequence; those that want yet another."""
        if not sequences or logits is None:
            return []
        rows = [_row(sequence, drafts[sequence]) for sequence in sequences]
        going_on = []
        for sequence, token in zip(sequences, sample(logits, rows), strict=True):
            # The two models' tables may be padded to different sizes behind the shared tokens.
            if token is None or token.token_id >= self._num_target_tokens:
                continue
            drafts[sequence].append(token.token_id)
            if len(drafts[sequence]) < wanted[sequence]:
                going_on.append(sequence)
        return going_on


def _row(sequence: Sequence, drafted: list[int]) -> SamplingRow:
    """The target's draw, without what knows the target's vocabulary: masks, biases, penalties. A
    guess may be wrong."""
    return replace(sequence.state.row(tuple(drafted)), num_logprobs=None, controls=None)


def _input(reader: _Reader, token_ids: list[int], num_cached_tokens: int) -> SequenceInput:
    stop = num_cached_tokens + len(token_ids)
    return SequenceInput(
        token_ids=token_ids,
        positions=range(num_cached_tokens, stop),
        block_ids=reader.blocks.block_ids,
        num_cached_tokens=num_cached_tokens,
    )
