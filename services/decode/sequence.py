"""One answer while it is being generated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

from shared.cache.block_pool import BlockHandle
from shared.errors import FailureKind
from shared.messages.descriptor import RequestDescriptor, SamplingParams, TokenId, WorkerRef
from shared.messages.events import Event, FailedEvent, FinishedEvent, FinishReason, TokenEvent
from shared.model.grammar import GrammarState
from shared.model.sampling_row import Sampled, SamplingState


@dataclass(eq=False)
class Sequence:
    """The live state of one sequence. Compared by identity.

    `kv_len` tokens lie in `blocks`; `last_token_id` is the newest token, not in the cache yet, and
    stands at rotary position `next_pos`; `next_index` counts the tokens of the answer so far.
    `state` knows them and makes the row that the next one is chosen by; `history` are prompt and
    answer up to `last_token_id`, where speculation needs them; `seniority` is smaller for what was
    admitted earlier.
    """

    request_id: str
    attempt: int
    gateway: WorkerRef
    sampling: SamplingParams
    state: SamplingState
    blocks: BlockHandle
    kv_len: int
    next_pos: int
    last_token_id: int
    next_index: int
    retired: bool = False
    history: list[int] = field(default_factory=list)
    seniority: int = 0

    @classmethod
    def begin(
        cls,
        request: RequestDescriptor,
        blocks: BlockHandle,
        *,
        next_pos: int,
        last_token_id: TokenId,
        next_index: int,
        grammar: GrammarState | None,
    ) -> Self:
        """An answer whose tokens up to `last_token_id` are there, with the KV of all before it."""
        return cls(
            request_id=request.request_id,
            attempt=request.attempt,
            gateway=request.gateway,
            sampling=request.sampling,
            state=SamplingState.of(request, grammar, last_token_id),
            blocks=blocks,
            kv_len=request.num_tokens,
            next_pos=next_pos,
            last_token_id=last_token_id,
            next_index=next_index,
            history=[*request.prompt_token_ids, *request.emitted_token_ids, last_token_id],
        )

    @property
    def num_remaining(self) -> int:
        """Tokens that the answer may still get."""
        return self.sampling.max_tokens - self.next_index

    def append(self, chosen: Sampled) -> tuple[Event, ...]:
        """Take in the token that the last step chose; returns what to tell the gateway.

        A stop token ends the answer and is not part of it. The last event says whether the answer
        is complete, or has failed because its grammar cannot go on.
        """
        token_id = chosen.token_id
        self.kv_len += 1
        self.next_pos += 1
        if (problem := self.state.append(token_id)) is not None:
            return (self._failed(problem),)
        if token_id in self.sampling.stop_token_ids:
            return (self._finished(FinishReason.STOP),)
        token = TokenEvent(
            request_id=self.request_id,
            attempt=self.attempt,
            index=self.next_index,
            token_id=token_id,
            logprobs=chosen.logprobs,
        )
        self.last_token_id = token_id
        self.history.append(token_id)
        self.next_index += 1
        if self.next_index >= self.sampling.max_tokens:
            return (token, self._finished(FinishReason.LENGTH))
        return (token,)

    def _failed(self, problem: str) -> FailedEvent:
        return FailedEvent(
            request_id=self.request_id,
            attempt=self.attempt,
            kind=FailureKind.BAD_REQUEST,
            message=problem,
            retryable=False,
        )

    def _finished(self, reason: FinishReason) -> FinishedEvent:
        return FinishedEvent(
            request_id=self.request_id,
            attempt=self.attempt,
            num_tokens=self.next_index,
            reason=reason,
        )
