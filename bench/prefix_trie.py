"""What an ideal prefix cache of unlimited size would find: a plain trie of blocks.

In: prompts in the order in which they are computed. Out: for each, the tokens that need not be
computed. It compares contents themselves, so it knows nothing of hashes, eviction or memory.
"""

from __future__ import annotations

from collections.abc import Iterator

from shared.text.prompt import Prompt

Row = tuple[int, str, int]
"""A token id; for a picture's placeholder also its content key and which row of it this is."""


class BlockTrie:
    """All prompts so far, cut into full blocks of `block_size` rows."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._seen: set[tuple[Row, ...]] = set()

    def add(self, prompt: Prompt) -> int:
        """Tokens of the prompt that are known, in full blocks and without its last token; then it
        is known as well."""
        rows = tuple(_rows(prompt))
        ends = range(self._block_size, len(rows) + 1, self._block_size)
        known = [end for end in ends if end < len(rows) and rows[:end] in self._seen]
        self._seen.update(rows[:end] for end in ends)
        return max(known, default=0)


def _rows(prompt: Prompt) -> Iterator[Row]:
    pictures = {
        item.offset + row: (item.content_key, row)
        for item in prompt.media
        for row in range(item.num_tokens)
    }
    for position, token_id in enumerate(prompt.token_ids):
        yield token_id, *pictures.get(position, ("", 0))
