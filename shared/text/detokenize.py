"""Token ids to text, as they come.

In: one id at a time. Out: the text that is certain by now. A character whose bytes are spread over
several tokens is held back until it is complete; at the end `flush` gives what is left, with U+FFFD
for bytes that never became a character. All pieces together equal the decoding of all ids.

Holds no more than the tokens of the last two pieces: a piece is decoded together with the one
before it, because decoders treat the first token of a text differently (its leading space).
"""

from __future__ import annotations

from shared.text.tokenizer import TextTokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A UTF-8 character has at most four bytes, so at most three can be waiting for the rest.
_MAX_WAITING = 3


class Detokenizer:
    """The text of one answer."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._num_context = 0
        self._shown = ""

    def push(self, token_id: int) -> str:
        """Take the next id; return the text that it completes, perhaps none."""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        if text.endswith(_REPLACEMENT) and not text.startswith(self._shown):
            # Byte-fallback decoders judge a run of bytes as a whole: one that is incomplete at its
            # end takes back characters that were already shown, until it is complete again.
            return ""
        certain = _without_waiting(text)
        piece = certain[len(self._shown) :]
        self._shown += piece
        if piece and certain == text:
            self._slide()
        return piece

    def flush(self) -> str:
        """The answer is over: return what was held back."""
        rest = self._tokenizer.decode(self._window)[len(self._shown) :]
        self._shown += rest
        return rest

    def _slide(self) -> None:
        """Everything is shown: the tokens of this piece become the context of the next."""
        self._window = self._window[self._num_context :]
        self._num_context = len(self._window)
        self._shown = self._tokenizer.decode(self._window)


def _without_waiting(text: str) -> str:
    for _ in range(_MAX_WAITING):
        text = text.removesuffix(_REPLACEMENT)
    return text
