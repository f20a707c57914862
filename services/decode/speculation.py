"""How many tokens to guess ahead, sequence by sequence, and what became of the guesses. Pure.

In: how long steps of so many tokens took, how long drafting took, and which guesses came true.
Out: the number of draft tokens per sequence that makes the most tokens per second, zero where
guessing would slow the step down. Knows neither models nor where drafts come from.

A sequence whose drafts come true with probability p gains p + p^2 + ... + p^k tokens from k of
them; each costs what one more token adds to a step. The best k for a whole batch maximises
expected tokens over expected time: a fractional program, solved exactly by Dinkelbach's iteration
(Dinkelbach 1967), because the gains are concave and the cost is linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.errors import SettingsError

MAX_DRAFT_TOKENS = 16
PRIOR_ACCEPTANCE = 0.6
ACCEPTANCE_WEIGHT = 0.1
"""Share of the newest observation in an estimate; about the last ten drafts count."""
PROBE_EVERY = 64
"""A sequence that is not worth a draft gets one token guessed every so many steps, to notice when
its text becomes predictable."""

COST_WEIGHT = 0.02
WARM_UP_STEPS = 4
PRIOR_TOKEN_SHARE, MIN_TOKEN_SHARE = 0.1, 0.001
"""What one more token adds to a step, as a share of the mean per token: until it was measured, and
at least."""
MIN_VARIATION = 0.0025
"""Squared variation of the steps' sizes below which they do not tell what a token costs."""
OUTLIER = 4.0
_MAX_ITERATIONS = 8


def num_accepted(draft: Sequence[int], sampled: Sequence[int | None]) -> int:
    """How many drafted tokens the target chose itself, up to the first that it did not.

    `sampled[i]` is the target's token where `draft[i]` was guessed; one more may follow.
    """
    for count, (guess, token) in enumerate(zip(draft, sampled, strict=False)):
        if guess != token:
            return count
    return len(draft)


class StepCost:
    """Seconds of a step as `base_s + token_s * num_tokens`, learned from the steps themselves.

    An exponentially weighted least-squares line. A step that took several times what was expected
    (another process was in the way) counts only as that many times.
    """

    def __init__(self) -> None:
        self._num_steps = 0
        self._n = self._s = self._nn = self._ns = 0.0
        self._is_measured = False
        self.base_s = self.token_s = 0.0

    @property
    def is_known(self) -> bool:
        """Whether there is anything to decide by."""
        return self._num_steps >= WARM_UP_STEPS

    def observe(self, num_tokens: int, step_s: float) -> None:
        """One step of so many tokens took so long."""
        if self.is_known:
            step_s = min(step_s, OUTLIER * self.expected_s(num_tokens))
        self._num_steps += 1
        gain = max(COST_WEIGHT, 1.0 / self._num_steps)
        self._n += gain * (num_tokens - self._n)
        self._s += gain * (step_s - self._s)
        self._nn += gain * (num_tokens * num_tokens - self._nn)
        self._ns += gain * (num_tokens * step_s - self._ns)
        self._fit()

    def expected_s(self, num_tokens: float) -> float:
        """Seconds that a step of so many tokens takes."""
        return self.base_s + self.token_s * num_tokens

    def _fit(self) -> None:
        even_share_s = self._s / self._n
        variance = self._nn - self._n * self._n
        if variance > MIN_VARIATION * self._nn:
            # Noise may tilt the line; no token is free, and none costs more than its even share.
            slope = (self._ns - self._n * self._s) / variance
            self.token_s = min(max(slope, MIN_TOKEN_SHARE * even_share_s), even_share_s)
            self._is_measured = True
        elif not self._is_measured:  # steps of one size do not tell the price of one token
            self.token_s = PRIOR_TOKEN_SHARE * even_share_s
        self.base_s = max(self._s - self.token_s * self._n, 0.0)


@dataclass(slots=True)
class Acceptance:
    """One sequence's guesses so far."""

    probability: float = PRIOR_ACCEPTANCE
    num_idle_steps: int = 0


class SpeculationPolicy:
    """Decides draft lengths and learns from outcomes; one per decode worker."""

    def __init__(self, max_tokens: int) -> None:
        if not 1 <= max_tokens <= MAX_DRAFT_TOKENS:
            raise SettingsError(
                f"max_draft_tokens is {max_tokens}, allowed are 1 to {MAX_DRAFT_TOKENS}"
            )
        self.max_tokens = max_tokens
        self.cost = StepCost()
        self._draft_token_s = 0.0
        self._powers = np.arange(1, max_tokens + 1, dtype=np.float64)

    def decide(self, states: Sequence[Acceptance], limits: Sequence[int]) -> npt.NDArray[np.int64]:
        """Draft tokens per sequence, `[num_sequences]`, at most `limits` of each."""
        most = np.clip(np.asarray(limits, dtype=np.int64), 0, self.max_tokens)
        chances = np.array([state.probability for state in states])
        gains = chances[:, None] ** self._powers  # [num_sequences, max_tokens]
        gains[self._powers > most[:, None]] = 0.0
        lengths = self._best_lengths(gains)
        for i, state in enumerate(states):
            state.num_idle_steps = 0 if lengths[i] else state.num_idle_steps + 1
            if state.num_idle_steps >= PROBE_EVERY and most[i]:
                lengths[i], state.num_idle_steps = 1, 0
        return lengths

    def observe_step(self, num_tokens: int, step_s: float) -> None:
        """One step of the target."""
        self.cost.observe(num_tokens, step_s)

    def observe_draft(self, num_drafted: int, draft_s: float) -> None:
        """So many tokens were drafted in so long, for all sequences of a step together."""
        if num_drafted:
            gain = ACCEPTANCE_WEIGHT if self._draft_token_s else 1.0
            self._draft_token_s += gain * (draft_s / num_drafted - self._draft_token_s)

    def observe_outcome(self, state: Acceptance, num_drafted: int, num_accepted: int) -> None:
        """A sequence's draft was checked: every accepted token came true, the next did not."""
        for _ in range(num_accepted):
            state.probability += ACCEPTANCE_WEIGHT * (1.0 - state.probability)
        if num_accepted < num_drafted:
            state.probability -= ACCEPTANCE_WEIGHT * state.probability

    def _best_lengths(self, gains: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """The lengths that maximise expected tokens over expected seconds."""
        num_sequences = len(gains)
        if not self.cost.is_known:  # the first steps are plain, and tell what a step costs
            return np.zeros(num_sequences, dtype=np.int64)
        token_s = self.cost.token_s + self._draft_token_s
        plain_s = self.cost.expected_s(num_sequences)
        rate = num_sequences / plain_s
        lengths = np.zeros(num_sequences, dtype=np.int64)
        for _ in range(_MAX_ITERATIONS):
            worth = gains > rate * token_s  # a run from the left: gains fall with the position
            tokens = num_sequences + float(gains[worth].sum())
            better = tokens / (plain_s + token_s * int(worth.sum()))
            lengths = worth.sum(axis=1)
            if better <= rate * (1 + 1e-9):
                break
            rate = better
        return lengths
