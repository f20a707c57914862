"""What a prompt's first token means for its answer, and what the gateway hears of it."""

from __future__ import annotations

from services.prefill.executor import FirstToken
from services.prefill.job import PrefillJob
from shared.messages.descriptor import RequestDescriptor
from shared.messages.events import Event, FinishedEvent, FinishReason, TokenEvent


def is_finished(request: RequestDescriptor, first: FirstToken) -> bool:
    """Whether the answer ends with its first token."""
    return (
        first.token_id in request.sampling.stop_token_ids
        or request.next_index + 1 >= request.sampling.max_tokens
    )


def events_of(job: PrefillJob, first: FirstToken) -> list[Event]:
    """What the gateway hears of a first token; a stop token ends the answer and is not part of
    it."""
    request = job.request
    index = request.next_index
    key = {"request_id": request.request_id, "attempt": request.attempt}
    if first.token_id in request.sampling.stop_token_ids:
        return [FinishedEvent(**key, num_tokens=index, reason=FinishReason.STOP)]
    token = TokenEvent(
        **key,
        index=index,
        token_id=first.token_id,
        num_cached_tokens=job.num_cached_tokens,
        logprobs=first.logprobs,
    )
    events: list[Event] = [token]
    if is_finished(request, first):
        events.append(FinishedEvent(**key, num_tokens=index + 1, reason=FinishReason.LENGTH))
    return events
