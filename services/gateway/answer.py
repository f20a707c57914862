"""One request's answer as it grows: events in, text and at most one end out. Pure.

Events may repeat (a task was redelivered), arrive out of order (token 0 comes from prefill, token 1
from decode) or be lost. Tokens are taken strictly by index: repeats are dropped, early ones wait, a
missing one shows as `gap_since_s`. Events of an older attempt are dropped. After the end nothing
changes any more. Knows no bus, no clock and no HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass

from shared.errors import FailureKind
from shared.messages.events import (
    Event,
    FailedEvent,
    FinishedEvent,
    FinishReason,
    TokenEvent,
    TokenLogprobs,
)
from shared.text.detokenize import Detokenizer
from shared.text.stop import StopMatcher
from shared.text.tokenizer import TextTokenizer

ToldToken = tuple[int, TokenLogprobs]
"""A token and what the model thought of it."""


@dataclass(frozen=True, slots=True)
class Advance:
    """What one event brought. `failure` ends the attempt, `end` ends the request.

    `told` are the new tokens of an answer that comes with logprobs; others have none.
    """

    text: str = ""
    num_new_tokens: int = 0
    end: FinishReason | None = None
    failure: FailedEvent | None = None
    told: tuple[ToldToken, ...] = ()

    def __add__(self, later: Advance) -> Advance:
        """Two advances as one, for a client that reads more slowly than tokens come."""
        return Advance(
            self.text + later.text,
            self.num_new_tokens + later.num_new_tokens,
            later.end or self.end,
            later.failure or self.failure,
            self.told + later.told,
        )


NOTHING = Advance()


class Answer:
    """The state of one answer. Early tokens are bounded by `max_tokens`.

    Stop strings count in the text that comes after `min_tokens` tokens.
    """

    def __init__(
        self,
        request_id: str,
        tokenizer: TextTokenizer,
        stops: tuple[str, ...],
        max_tokens: int,
        min_tokens: int = 0,
    ) -> None:
        self._request_id = request_id
        self._max_tokens = max_tokens
        self._min_tokens = min_tokens
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopMatcher(stops)
        self._early: dict[int, TokenEvent] = {}
        self._finished: FinishedEvent | None = None
        self.attempt = 0
        self.token_ids: list[int] = []
        self.num_cached_tokens = 0
        self.end: FinishReason | None = None
        self.gap_since_s: float | None = None

    def restart(self) -> None:
        """A new attempt carries on after the tokens known so far; what came too early is void."""
        self.attempt += 1
        self._early.clear()
        self._finished = None
        self.gap_since_s = None

    def accept(self, event: Event, now_s: float) -> Advance:
        """Take one event of this request."""
        if self.end is not None or event.attempt != self.attempt:
            return NOTHING
        match event:
            case FailedEvent():
                return Advance(failure=event)
            case TokenEvent():
                if len(self.token_ids) <= event.index < self._max_tokens:
                    self._early[event.index] = event
            case FinishedEvent():
                if event.num_tokens < len(self.token_ids):
                    return Advance(failure=self._contradiction(event))
                self._finished = event
        return self._advance(now_s)

    def _advance(self, now_s: float) -> Advance:
        """Take every token whose turn it is, then see whether that was the last."""
        text, num_before = "", len(self.token_ids)
        told: list[ToldToken] = []
        while self.end is None and (index := len(self.token_ids)) in self._early:
            token = self._early.pop(index)
            text += self._take(token)
            if token.logprobs is not None:
                told.append((token.token_id, token.logprobs))
        if self.end is None and (reason := self._reason()) is not None:
            text += self._finish(reason)
        waiting = self.end is None and (self._early or self._finished is not None)
        self.gap_since_s = (self.gap_since_s or now_s) if waiting else None
        num_new_tokens = len(self.token_ids) - num_before
        return Advance(text, num_new_tokens, self.end, told=tuple(told))

    def _take(self, token: TokenEvent) -> str:
        if token.index == 0:
            self.num_cached_tokens = token.num_cached_tokens
        self.token_ids.append(token.token_id)
        piece = self._detokenizer.push(token.token_id)
        if token.index < self._min_tokens:
            return piece
        shown = self._stops.push(piece)
        if shown.stopped:
            self.end = FinishReason.STOP
        return shown.text

    def _reason(self) -> FinishReason | None:
        """Whether the answer is complete. The last token of a full answer needs no confirmation."""
        if self._finished is not None and self._finished.num_tokens == len(self.token_ids):
            return self._finished.reason
        return FinishReason.LENGTH if len(self.token_ids) == self._max_tokens else None

    def _finish(self, reason: FinishReason) -> str:
        """Show what was held back; it may still complete a stop string."""
        shown = self._stops.push(self._detokenizer.flush())
        self.end = FinishReason.STOP if shown.stopped else reason
        return shown.text + self._stops.flush()

    def _contradiction(self, event: FinishedEvent) -> FailedEvent:
        return FailedEvent(
            request_id=self._request_id,
            attempt=event.attempt,
            kind=FailureKind.INTERNAL,
            message=f"a worker reported the end after {event.num_tokens} tokens, "
            f"{len(self.token_ids)} had arrived",
            retryable=False,
        )
