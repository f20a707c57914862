"""Drafts from the text itself: what followed the last few tokens when they came before. Pure.

In: a sequence's tokens, prompt included. Out: its likely continuation, where the newest tokens
stood somewhere before; nothing where they did not. Quoting, code and tables repeat themselves, and
looking costs next to nothing.

Source: Saxena 2023 (prompt lookup decoding).
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST, SHORTEST = 4, 2
MAX_INDEXED_AT_ONCE = 8192
"""Of a longer prompt only the end is looked at: indexing it takes a moment in which all wait."""


class NgramIndex:
    """Where each run of `SHORTEST` to `LONGEST` tokens of one sequence ended last.

    Reads a history that its owner only ever extends. Memory and time are linear in its length.
    """

    def __init__(self) -> None:
        self._num_indexed = 0
        self._ends: dict[tuple[int, ...], int] = {}

    def propose(self, history: Sequence[int], max_tokens: int) -> list[int]:
        """Up to `max_tokens` tokens that may follow `history`."""
        self._index(history)
        for size in range(min(LONGEST, len(history)), SHORTEST - 1, -1):
            end = self._ends.get(tuple(history[-size:]))
            if end is not None:
                return _continued(history, end, max_tokens)
        return []

    def _index(self, history: Sequence[int]) -> None:
        """Take in all runs but those that end with the newest token: they are what is looked up."""
        start = max(self._num_indexed, SHORTEST, len(history) - MAX_INDEXED_AT_ONCE)
        for end in range(start, len(history)):
            for size in range(SHORTEST, min(LONGEST, end) + 1):
                self._ends[tuple(history[end - size : end])] = end
        self._num_indexed = max(self._num_indexed, len(history))


def _continued(history: Sequence[int], start: int, num_tokens: int) -> list[int]:
    """`num_tokens` tokens from `start` on; a text that repeats itself goes on repeating."""
    period = len(history) - start
    return [history[start + offset % period] for offset in range(num_tokens)]
