"""Keeps special tokens that a user typed from meaning anything.

In: the strings of a user's messages. Out: the same strings with a stand-in wherever they hold, or
could form together with a neighbour, a special token; and, after the chat template has run, ids in
which every special token was written by the template. A stand-in carries a nonce, so a user cannot
type one.

The usual request holds nothing suspicious and is tokenised in one piece, exactly as the reference
implementation would.
"""

from __future__ import annotations

import re
import secrets

from shared.text.tokenizer import TextTokenizer


class SpecialTokenGuard:
    """Guards the texts of one prompt. Make a new one for each prompt: the nonce is not reused."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._specials = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, self._specials)) or r"(?!)")
        self._nonce = secrets.token_hex(8)
        self._hidden: list[str] = []

    def hide(self, text: str) -> str:
        """The text with stand-ins for what must not be read as a special token."""
        guarded = self._pattern.sub(lambda match: self._stand_in(match.group()), text)
        body = guarded.rstrip()
        if self._ends_like_a_special(body):
            # A template may put two parts side by side, and may trim them: separate them.
            return body + self._stand_in("") + guarded[len(body) :]
        return guarded

    def encode(self, rendered: str) -> list[int]:
        """Ids of what the template made of the guarded texts."""
        if not self._hidden:
            return self._tokenizer.encode_template(rendered)
        ids: list[int] = []
        end = 0
        for match in self._pattern.finditer(rendered):
            ids += self._encode_text(rendered[end : match.start()])
            ids.append(self._tokenizer.special_tokens[match.group()])
            end = match.end()
        return ids + self._encode_text(rendered[end:])

    def _stand_in(self, hidden: str) -> str:
        self._hidden.append(hidden)
        return f"[{self._nonce}.{len(self._hidden) - 1}]"

    def _encode_text(self, text: str) -> list[int]:
        pattern = rf"\[{self._nonce}\.(\d+)\]"
        shown = re.sub(pattern, lambda match: self._hidden[int(match.group(1))], text)
        return self._tokenizer.encode_text(shown) if shown else []

    def _ends_like_a_special(self, text: str) -> bool:
        return any(
            text.endswith(special[:length])
            for special in self._specials
            for length in range(1, len(special))
            if special[length - 1] == text[-1:]
        )
