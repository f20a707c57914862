"""One request in the metrics: when its tokens came and how it ended."""

from __future__ import annotations

from collections.abc import Sequence

from services.gateway.answer import Advance
from services.gateway.metrics import GatewayMetrics
from services.gateway.recovery import Trouble
from services.gateway.streams import OnAdvance
from shared.clock import Clock, monotonic
from shared.messages.events import FinishReason


class Account:
    """Made when the request arrives; ended exactly once, later endings are ignored."""

    def __init__(self, metrics: GatewayMetrics, clock: Clock = monotonic) -> None:
        self._metrics = metrics
        self._clock = clock
        self._arrived_s = clock()
        self._num_tokens = 0
        self._has_tokens = False
        self._ended = False

    def prepared(self, num_prompt_tokens: int) -> None:
        """Ingest is done."""
        self._metrics.ingest_s.observe(self._clock() - self._arrived_s)
        self._metrics.prompt_tokens.inc(num_prompt_tokens)
        self._metrics.request_prompt_tokens.observe(num_prompt_tokens)

    def watch(self) -> OnAdvance:
        """To be told of the tokens of one answer; a request with several has several."""
        newest_s: float | None = None

        def on_advance(advance: Advance, now_s: float) -> None:
            nonlocal newest_s
            if advance.num_new_tokens:
                self._took(advance.num_new_tokens, newest_s, now_s)
                newest_s = now_s

        return on_advance

    def _took(self, num_tokens: int, newest_s: float | None, now_s: float) -> None:
        """Tokens arrived; several at once share the time since the last."""
        if not self._has_tokens:
            self._metrics.ttft_s.observe(now_s - self._arrived_s)
            self._has_tokens = True
        if newest_s is None:
            newest_s, num_gaps = now_s, num_tokens - 1
        else:
            num_gaps = num_tokens
        for _ in range(num_gaps):
            self._metrics.itl_s.observe((now_s - newest_s) / num_gaps)
        self._num_tokens += num_tokens
        self._metrics.generation_tokens.inc(num_tokens)

    def succeeded(self, reasons: Sequence[FinishReason]) -> None:
        """All answers are complete; a request counts as cut if one of them was."""
        if self._end():
            reason = FinishReason.LENGTH if FinishReason.LENGTH in reasons else FinishReason.STOP
            self._metrics.success.labels(reason.value).inc()
            self._metrics.request_generation_tokens.observe(self._num_tokens)

    def failed(self, status: int) -> None:
        if self._end():
            self._metrics.failure.labels(str(status)).inc()

    def disconnected(self) -> None:
        if self._end():
            self._metrics.disconnects.inc()

    def resubmitted(self, troubles: list[Trouble]) -> None:
        """Once, at the end: what went wrong on the way."""
        for trouble in troubles:
            self._metrics.resubmissions.labels(trouble.value).inc()

    def _end(self) -> bool:
        if self._ended:
            return False
        self._ended = True
        self._metrics.e2e_s.observe(self._clock() - self._arrived_s)
        return True
