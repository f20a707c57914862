"""Whatever order, repetition or mixture of attempts: each token once, one end."""

import hypothesis.strategies as st
from hypothesis import given, settings

from services.gateway.answer import NOTHING, Advance, Answer
from shared.errors import FailureKind
from shared.messages.events import FailedEvent, FinishedEvent, FinishReason, TokenEvent
from shared.runtime.settings import DEMO_MODEL
from shared.text.tokenizer import TextTokenizer

TOKENIZER = TextTokenizer.load(DEMO_MODEL)
TEXT = "the cat 🐈 sat"
IDS = TOKENIZER.encode_text(TEXT)


def token(index: int, attempt: int = 0, token_id: int | None = None) -> TokenEvent:
    token_id = IDS[index] if token_id is None else token_id
    return TokenEvent(request_id="r", attempt=attempt, index=index, token_id=token_id)


def finished(num_tokens: int, attempt: int = 0, reason="stop") -> FinishedEvent:
    return FinishedEvent(
        request_id="r", attempt=attempt, num_tokens=num_tokens, reason=FinishReason(reason)
    )


def failed(attempt: int = 0) -> FailedEvent:
    return FailedEvent(
        request_id="r",
        attempt=attempt,
        kind=FailureKind.INTERNAL,
        message="broken",
        retryable=True,
    )


def new_answer(stops=(), max_tokens=1000) -> Answer:
    return Answer("r", TOKENIZER, stops, max_tokens)


def feed(answer: Answer, events) -> Advance:
    total = NOTHING
    for event in events:
        total += answer.accept(event, 0.0)
    return total


@settings(max_examples=300)
@given(st.data())
def test_any_order_and_repetition(data):
    events = [*map(token, range(len(IDS))), finished(len(IDS))]
    extra = data.draw(st.lists(st.sampled_from(events), max_size=10))
    answer = new_answer()
    total = feed(answer, data.draw(st.permutations(events + extra)))
    assert (total.text, total.num_new_tokens) == (TEXT, len(IDS))
    assert total.end is FinishReason.STOP
    assert answer.token_ids == IDS


@given(st.integers(0, len(IDS) - 1), st.lists(st.integers(0, len(IDS) - 1)))
def test_another_attempt_carries_on(num_known, stale):
    answer = new_answer()
    total = feed(answer, map(token, range(num_known)))
    answer.restart()
    total += feed(answer, [token(i, 0, token_id=5) for i in stale] + [failed(0), finished(0, 0)])
    total += feed(answer, [token(i, 1) for i in range(num_known, len(IDS))])
    total += feed(answer, [finished(len(IDS), 1)])
    assert (total.text, total.end, total.failure) == (TEXT, FinishReason.STOP, None)


def test_nothing_changes_after_the_end():
    answer = new_answer()
    feed(answer, [finished(0)])
    assert feed(answer, [token(0), failed(), finished(3)]) == NOTHING


def test_a_gap_shows_since_when():
    answer = new_answer()
    answer.accept(token(0), 1.0)
    assert answer.gap_since_s is None
    answer.accept(token(2), 2.0)
    answer.accept(token(3), 3.0)
    assert answer.gap_since_s == 2.0
    answer.accept(token(1), 4.0)
    assert answer.gap_since_s is None
    answer.accept(finished(9), 5.0)
    assert answer.gap_since_s == 5.0
    answer.restart()
    assert answer.gap_since_s is None


def test_the_limit_ends_the_answer_without_a_finished_event():
    total = feed(new_answer(max_tokens=2), map(token, range(4)))
    assert (total.num_new_tokens, total.end) == (2, FinishReason.LENGTH)


def test_held_back_text_is_shown_at_the_end():
    total = feed(new_answer(stops=("sat on",)), [*map(token, range(len(IDS))), finished(len(IDS))])
    assert total.text == TEXT
    assert total.end is FinishReason.STOP


def test_a_stop_string_ends_the_answer_but_not_the_worker():
    total = feed(new_answer(stops=("cat",)), map(token, range(len(IDS))))
    assert (total.text, total.end) == ("the ", FinishReason.STOP)


def test_an_end_before_known_tokens_is_a_failure():
    total = feed(new_answer(), [token(0), token(1), finished(1)])
    assert total.end is None
    assert total.failure is not None
    assert not total.failure.retryable


def test_memory_is_bounded_by_the_token_limit():
    answer = new_answer(max_tokens=4)
    feed(answer, [token(1 + i % 500, token_id=3) for i in range(1000)])
    assert len(answer._early) <= 4
