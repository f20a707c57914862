"""What is found does not depend on how the text is cut."""

import hypothesis.strategies as st
from hypothesis import given, settings

from shared.text.stop import Shown, StopMatcher


def run(stops, cuts) -> tuple[str, bool]:
    matcher, text = StopMatcher(tuple(stops)), ""
    for cut in cuts:
        shown = matcher.push(cut)
        text += shown.text
        if shown.stopped:
            return text, True
    return text + matcher.flush(), False


def oracle(stops, text) -> tuple[str, bool]:
    """Letter by letter: the stop string that is complete first, and of those the longest."""
    for end in range(1, len(text) + 1):
        ending = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(ending)], True
    return text, False


LETTERS = st.text("ab", max_size=6)


@settings(max_examples=500)
@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.lists(LETTERS, max_size=6))
def test_equals_reading_letter_by_letter(stops, cuts):
    assert run(stops, cuts) == oracle(stops, "".join(cuts))


def test_a_possible_beginning_is_held_back():
    matcher = StopMatcher(("END",))
    assert matcher.push("one E") == Shown("one ")
    assert matcher.push("N") == Shown("")
    assert matcher.push("d") == Shown("ENd")


def test_the_stop_string_is_not_shown_and_nothing_follows():
    matcher = StopMatcher(("END",))
    assert matcher.push("xEND y") == Shown("x", stopped=True)
    assert matcher.push("more") == Shown("", stopped=True)
    assert matcher.flush() == ""
