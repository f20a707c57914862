"""Events of a stream as bytes."""

from __future__ import annotations

from functools import partial

import pytest

from services.gateway.openai_answers import AnswerHead
from services.gateway.sse import event, text_events

TEXTS = ("", " a", '"\\\n\r\t\0\x1f\x7f', "\u2028\N{GRINNING FACE}\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize("model", ["m", '"\0"', 'a "model"', "\N{SNOWMAN}"])
@pytest.mark.parametrize("with_usage", [False, True])
def test_text_events_are_the_events_of_their_texts(model: str, with_usage: bool) -> None:
    head = AnswerHead(request_id="r", model=model, created_unix_s=7, with_usage=with_usage)
    for index in (0, 3):
        encode = text_events(partial(head.text_chunk, index=index))
        for text in TEXTS:
            assert encode(text) == event(head.text_chunk(text, index))
