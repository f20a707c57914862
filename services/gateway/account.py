"""One request in the metrics: when its tokens came and how it ended."""

from __future__ import annotations

from services.gateway.answer import Advance
from services.gateway.metrics import GatewayMetrics
from services.gateway.recovery import Trouble
from shared.clock import Clock, monotonic
from shared.messages.events import FinishReason


class Account:
    """Made when the request arrives; ended exactly once, later endings are ignored."""

    def __init__(self, metrics: GatewayMetrics, clock: Clock = monotonic) -> None:
        self._metrics = metrics
        self._clock = clock
        self._arrived_s = clock()
        self._newest_s: float | None = None
        self._num_tokens = 0
        self._ended = False

    def prepared(self, num_prompt_tokens: int) -> None:
        """Ingest is done."""
        self._metrics.ingest_s.observe(self._clock() - self._arrived_s)
        self._metrics.prompt_tokens.inc(num_prompt_tokens)
        self._metrics.request_prompt_tokens.observe(num_prompt_tokens)

    def on_advance(self, advance: Advance, now_s: float) -> None:
        """Tokens arrived; several at once share the time since the last."""
        if not advance.num_new_tokens:
            return
        num_gaps = advance.num_new_tokens
        if self._newest_s is None:
            self._metrics.ttft_s.observe(now_s - self._arrived_s)
            self._newest_s, num_gaps = now_s, num_gaps - 1
        for _ in range(num_gaps):
            self._metrics.itl_s.observe((now_s - self._newest_s) / num_gaps)
        self._newest_s = now_s
        self._num_tokens += advance.num_new_tokens
        self._metrics.generation_tokens.inc(advance.num_new_tokens)

    def succeeded(self, reason: FinishReason) -> None:
        if self._end():
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
