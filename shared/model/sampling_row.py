"""What one row of logits needs to become a token, and what comes of it.

In: a sequence's sampling parameters, its prompt, its answer so far, its grammar. Out:
`SamplingRow`s for `sample`, one for each position whose token is to be chosen. The state is built
from token ids alone, so a sequence that is taken up elsewhere goes on exactly as it would have.
Knows neither logits nor torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from shared.messages.descriptor import RequestDescriptor, SamplingParams
from shared.messages.events import TokenLogprobs
from shared.model.grammar import GrammarState
from shared.model.history import IntArray, TokenHistory

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sampled:
    """A chosen token, with what the model thought of it where that was asked for."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Controls:
    """What changes a sequence's logits before the draw. `history` and `grammar` follow the answer.

    Penalties as in `SamplingParams`; `history` is None where they change nothing. `banned_ids`
    cannot be chosen before index `min_tokens`.
    """

    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    history: TokenHistory | None = None
    bias_ids: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    bias_values: FloatArray = field(default_factory=lambda: np.empty(0, dtype=np.float64))
    banned_ids: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    min_tokens: int = 0
    grammar: GrammarState | None = None


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """How one row is drawn.

    `temperature=0` is greedy; `top_k=0`, `top_p=1` and `min_p=0` mean no filter. `index` is the
    index of the token within the answer, so that (seed, index) names one random number for ever.
    `drafts` are guessed tokens between the answer so far, which `controls` know, and this row's.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    index: int = 0
    num_logprobs: int | None = None
    controls: Controls | None = None
    drafts: tuple[int, ...] = ()

    @property
    def is_greedy(self) -> bool:
        return self.temperature <= 0.0


class SamplingState:
    """Makes the sampling rows of one sequence, and follows its answer."""

    def __init__(
        self,
        sampling: SamplingParams,
        prompt_ids: Sequence[int],
        answer_ids: Sequence[int] = (),
        grammar: GrammarState | None = None,
    ) -> None:
        self._sampling = sampling
        self._next_index = len(answer_ids)
        self._controls = _controls(sampling, prompt_ids, answer_ids, grammar)

    @classmethod
    def of(
        cls, request: RequestDescriptor, grammar: GrammarState | None, *newer_ids: int
    ) -> SamplingState:
        """After the tokens that the request knows of and those that were generated since."""
        answer_ids = (*request.emitted_token_ids, *newer_ids)
        return cls(request.sampling, request.prompt_token_ids, answer_ids, grammar)

    def row(self, drafts: tuple[int, ...] = ()) -> SamplingRow:
        """The row of the next token, or of the one that would follow these guessed ones."""
        sampling = self._sampling
        return SamplingRow(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=sampling.seed,
            index=self._next_index + len(drafts),
            num_logprobs=sampling.num_logprobs,
            controls=self._controls,
            drafts=drafts,
        )

    def append(self, token_id: int) -> str | None:
        """The answer grew by this token. Returns why its grammar cannot go on, else None."""
        self._next_index += 1
        controls = self._controls
        if controls is None:
            return None
        if controls.history is not None:
            controls.history.append(token_id)
        return None if controls.grammar is None else controls.grammar.append(token_id)


def _controls(
    sampling: SamplingParams,
    prompt_ids: Sequence[int],
    answer_ids: Sequence[int],
    grammar: GrammarState | None,
) -> Controls | None:
    """None where logits are taken as the model gives them."""
    is_penal = (
        sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
        or sampling.repetition_penalty != 1.0
    )
    bans = sampling.min_tokens > len(answer_ids) and bool(sampling.stop_token_ids)
    if not (is_penal or bans or sampling.logit_bias or grammar):
        return None
    return Controls(
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        history=TokenHistory(prompt_ids, answer_ids) if is_penal else None,
        bias_ids=np.array([token_id for token_id, _ in sampling.logit_bias], dtype=np.int64),
        bias_values=np.array([value for _, value in sampling.logit_bias], dtype=np.float64),
        banned_ids=np.array(sampling.stop_token_ids, dtype=np.int64),
        min_tokens=sampling.min_tokens,
        grammar=grammar,
    )
