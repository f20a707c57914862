"""Which tokens a sequence holds already, and how often, as the penalties need it.

In: the ids of a prompt and of the answer so far, then one id at a time. Out: the different ids with
their counts, as arrays. Taking in a token costs the same however long the sequence is. Knows
neither logits nor torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

_FIRST_CAPACITY = 64


class TokenHistory:
    """The different tokens of one sequence; `counts` are those of the answer alone."""

    def __init__(self, prompt_ids: Sequence[int], answer_ids: Sequence[int] = ()) -> None:
        seen = np.unique(np.asarray(prompt_ids, dtype=np.int64))
        self._num_ids = len(seen)
        self._ids: IntArray = np.concatenate((seen, np.zeros(_FIRST_CAPACITY, dtype=np.int64)))
        self._counts: IntArray = np.zeros_like(self._ids)
        self._column_of = {int(token_id): column for column, token_id in enumerate(seen)}
        for token_id in answer_ids:
            self.append(token_id)

    def append(self, token_id: int) -> None:
        """The answer grew by this token."""
        column = self._column_of.get(token_id)
        if column is None:
            column = self._column_of[token_id] = self._num_ids
            if column == len(self._ids):
                self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
                self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
            self._ids[column] = token_id
            self._num_ids += 1
        self._counts[column] += 1

    def seen(self, drafts: Sequence[int] = ()) -> tuple[IntArray, IntArray]:
        """Ids and counts, `[n]` each, as if the answer had gone on with `drafts`.

        Without drafts these are views that the next `append` changes.
        """
        ids, counts = self._ids[: self._num_ids], self._counts[: self._num_ids]
        if not drafts:
            return ids, counts
        new = [token_id for token_id in dict.fromkeys(drafts) if token_id not in self._column_of]
        column_of = {token_id: self._num_ids + i for i, token_id in enumerate(new)}
        ids = np.concatenate((ids, np.array(new, dtype=np.int64)))
        counts = np.concatenate((counts, np.zeros(len(new), dtype=np.int64)))
        for token_id in drafts:
            column = self._column_of.get(token_id)
            counts[column_of[token_id] if column is None else column] += 1
        return ids, counts
