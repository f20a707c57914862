"""What a stream keeps of an attempt when the next one begins."""

from __future__ import annotations

from services.gateway.answer import Advance
from services.gateway.streams import Stream
from shared.errors import FailureKind
from shared.messages.descriptor import WorkerRef
from shared.messages.events import FailedEvent, TokenEvent

WORKER = WorkerRef(name="decode-0", incarnation=1)


class FakeAnswer:
    """Takes every event of its attempt."""

    attempt = 0

    def accept(self, event: object, now_s: float) -> Advance:
        if isinstance(event, FailedEvent):
            return Advance(failure=event)
        return Advance(text="x", num_new_tokens=1)

    def restart(self) -> None:
        self.attempt += 1


async def test_an_old_attempts_failure_is_not_the_new_ones() -> None:
    stream = Stream(FakeAnswer(), lambda advance, now_s: None)
    token = TokenEvent(request_id="r", attempt=0, index=0, token_id=1)
    failure = FailedEvent(
        request_id="r",
        attempt=0,
        kind=FailureKind.INTERNAL,
        message="late",
        retryable=False,
    )
    stream.take(WORKER, token, 1.0)
    stream.take(WORKER, failure, 1.0)
    assert stream.num_attempt_tokens == 1
    stream.restart()
    unseen = await stream.next(0.1)
    assert unseen is not None
    assert (unseen.text, unseen.failure) == ("x", None)
    assert stream.num_attempt_tokens == 0
