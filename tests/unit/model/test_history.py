"""Counts of a sequence's tokens, against counting anew each time."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from shared.model.history import TokenHistory

tokens = st.lists(st.integers(0, 300), max_size=200)


def counted(history: TokenHistory, drafts: list[int]) -> dict[int, int]:
    ids, counts = history.seen(drafts)
    assert len(set(ids.tolist())) == len(ids), "an id is listed twice"
    return dict(zip(ids.tolist(), counts.tolist(), strict=True))


@settings(deadline=None, max_examples=50)
@given(prompt=tokens, emitted=tokens, newer=tokens, drafts=tokens)
def test_counts_are_those_of_the_answer(
    prompt: list[int], emitted: list[int], newer: list[int], drafts: list[int]
) -> None:
    history = TokenHistory(prompt, emitted)
    for token_id in newer:
        history.append(token_id)
    answer = Counter(emitted + newer)
    assert counted(history, []) == {token: answer[token] for token in {*prompt, *answer}}
    guessed = answer + Counter(drafts)
    assert counted(history, drafts) == {token: guessed[token] for token in {*prompt, *guessed}}
    # Guessing leaves no trace.
    assert counted(history, []) == {token: answer[token] for token in {*prompt, *answer}}
