"""Logprobs as the OpenAI API shows them.

In: the tokens of an answer and what the model thought of them. Out: JSON entries. A token that is
only part of a character shows as U+FFFD; its `bytes` are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from services.gateway.answer import ToldToken
from shared.text.tokenizer import TextTokenizer

Json = dict[str, Any]


def logprob_entries(told: Sequence[ToldToken], tokenizer: TextTokenizer) -> list[Json]:
    """One entry per token, each with its alternatives."""
    return [
        _entry(token_id, logprobs.logprob, tokenizer)
        | {"top_logprobs": [_entry(other, value, tokenizer) for other, value in logprobs.top]}
        for token_id, logprobs in told
    ]


def _entry(token_id: int, logprob: float, tokenizer: TextTokenizer) -> Json:
    token_bytes = tokenizer.bytes_of(token_id)
    return {
        "token": token_bytes.decode("utf-8", errors="replace"),
        "logprob": logprob,
        "bytes": list(token_bytes),
    }
