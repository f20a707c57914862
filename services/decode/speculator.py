"""Drafts for the sequences of a step, from whoever can guess, as many as pay.

In: the sequences, and afterwards what the target chose. Out: draft tokens per sequence. Joins the
policy, which decides how many, and a proposer, which guesses; knows neither logits nor blocks.
"""

from __future__ import annotations

from collections.abc import Sequence as Sequences
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

from services.decode.ngram import NgramIndex
from services.decode.sequence import Sequence
from services.decode.speculation import Acceptance, SpeculationPolicy


@dataclass(frozen=True, slots=True)
class Proposal:
    """Drafts per sequence, and what `num_timed` of their tokens took in a model."""

    drafts: list[list[int]]
    num_timed: int = 0
    timed_s: float = 0.0


class Proposer(Protocol):
    """A way to guess. Guesses change how fast an answer comes, never what it says."""

    def propose(self, sequences: Sequences[Sequence], lengths: Sequences[int]) -> Proposal:
        """At most `lengths[i]` tokens that may follow `sequences[i].history`."""
        ...


class NgramProposer:
    """Guesses that a text repeats itself."""

    def __init__(self) -> None:
        self._indexes: WeakKeyDictionary[Sequence, NgramIndex] = WeakKeyDictionary()

    def propose(self, sequences: Sequences[Sequence], lengths: Sequences[int]) -> Proposal:
        return Proposal(
            [
                self._index(sequence).propose(sequence.history, length) if length else []
                for sequence, length in zip(sequences, lengths, strict=True)
            ]
        )

    def _index(self, sequence: Sequence) -> NgramIndex:
        index = self._indexes.get(sequence)
        if index is None:
            index = self._indexes[sequence] = NgramIndex()
        return index


class Speculator:
    """Policy and proposer of one decode worker. Used by the compute thread only."""

    def __init__(self, policy: SpeculationPolicy, proposer: Proposer) -> None:
        self._policy = policy
        self._proposer = proposer
        self._states: WeakKeyDictionary[Sequence, Acceptance] = WeakKeyDictionary()

    def draft(
        self, sequences: Sequences[Sequence], limits: Sequences[int]
    ) -> list[list[int]] | None:
        """Draft tokens of each sequence, at most `limits[i]`; None if nobody gets any."""
        states = [self._state(sequence) for sequence in sequences]
        lengths = self._policy.decide(states, limits)
        if not lengths.any():
            return None
        proposal = self._proposer.propose(sequences, lengths.tolist())
        self._policy.observe_draft(proposal.num_timed, proposal.timed_s)
        return proposal.drafts if any(proposal.drafts) else None

    def learn(
        self, sequences: Sequences[Sequence], num_drafted: Sequences[int], accepted: Sequences[int]
    ) -> None:
        """What became of the drafts."""
        for sequence, drafted, came_true in zip(sequences, num_drafted, accepted, strict=True):
            if drafted:
                self._policy.observe_outcome(self._state(sequence), drafted, came_true)

    def took(self, num_tokens: int, step_s: float) -> None:
        """A step of the target over so many tokens took so long."""
        self._policy.observe_step(num_tokens, step_s)

    def _state(self, sequence: Sequence) -> Acceptance:
        state = self._states.get(sequence)
        if state is None:
            state = self._states[sequence] = Acceptance()
        return state
