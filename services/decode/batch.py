"""The decode batch as arrays that live from step to step.

In: the sequences of a step and what was drafted for each. Out: a `ForwardBatch`. A sequence's row
of block ids is written when it joins and when its blocks grow, and moved with the others when the
batch changes; a step only reads three numbers of each sequence. Knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence as Sequences
from itertools import chain
from operator import attrgetter

import numpy as np
import torch

from services.decode.sequence import Sequence
from shared.cache.block_pool import BlockHandle
from shared.model.batch import ForwardBatch, IntArray

_blocks = attrgetter("blocks")
_numbers = attrgetter("last_token_id", "kv_len", "next_pos")


class DecodeBatch:
    """Block tables of the running sequences, and the packed step made from them."""

    def __init__(self, block_size: int, device: torch.device | str = "cpu") -> None:
        self._block_size = block_size
        self._device = device
        self._handles: list[BlockHandle] = []
        self._num_blocks: list[int] = []
        self._tables: IntArray = np.zeros((0, 1), dtype=np.int64)
        self._device_tables = torch.from_numpy(self._tables)

    def pack(
        self, sequences: Sequences[Sequence], drafts: Sequences[Sequences[int]] | None = None
    ) -> ForwardBatch:
        """The newest token of each sequence, followed by its draft tokens.

        Raises `ValueError` where a sequence's blocks do not cover them.
        """
        self._refresh(sequences)
        count = len(sequences)
        numbers = np.fromiter(
            chain.from_iterable(map(_numbers, sequences)), np.int64, 3 * count
        ).reshape(count, 3)
        token_ids, kv_lens, positions = numbers.T
        lens = np.ones(count, dtype=np.int64)
        rows = np.arange(count)
        cache_index = kv_lens
        if drafts is not None:
            lens += np.fromiter(map(len, drafts), np.int64, count)
            rows = np.repeat(rows, lens)
            offset = np.arange(len(rows)) - np.repeat(np.cumsum(lens) - lens, lens)
            cache_index, positions = kv_lens[rows] + offset, positions[rows] + offset
            token_ids = _interleaved(sequences, drafts)
        self._check_covered(kv_lens + lens)
        block_ids = self._tables[rows, cache_index // self._block_size]
        return ForwardBatch(
            token_ids=self._move(token_ids),
            positions=self._move(positions),
            slot_mapping=self._move(block_ids * self._block_size + cache_index % self._block_size),
            cu_seqlens_q=self._move(np.concatenate(([0], np.cumsum(lens)))),
            context_lens=self._move(kv_lens + lens),
            block_tables=self._device_tables,
        )

    def _refresh(self, sequences: Sequences[Sequence]) -> None:
        """Bring the tables up to date with who runs and what each owns."""
        handles = list(map(_blocks, sequences))
        num_blocks = list(map(len, handles))
        if handles == self._handles and num_blocks == self._num_blocks:
            return
        known = {handle: row for row, handle in enumerate(self._handles)}
        width = max(num_blocks)
        tables = np.zeros((len(handles), width), dtype=np.int64)
        for row, (handle, length) in enumerate(zip(handles, num_blocks, strict=True)):
            old = known.get(handle)
            if old is not None and self._num_blocks[old] == length:
                tables[row, :length] = self._tables[old, :length]
            else:
                tables[row, :length] = handle.block_ids
        self._handles, self._num_blocks, self._tables = handles, num_blocks, tables
        self._device_tables = self._move(tables)

    def _check_covered(self, context_lens: IntArray) -> None:
        owned = np.array(self._num_blocks, dtype=np.int64) * self._block_size
        if (context_lens > owned).any():
            row = int((context_lens > owned).argmax())
            raise ValueError(
                f"{context_lens[row]} tokens do not fit into "
                f"{self._num_blocks[row]} blocks of {self._block_size}"
            )

    def _move(self, array: IntArray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


def _interleaved(sequences: Sequences[Sequence], drafts: Sequences[Sequences[int]]) -> IntArray:
    tokens: list[int] = []
    for sequence, draft in zip(sequences, drafts, strict=True):
        tokens.append(sequence.last_token_id)
        tokens += draft
    return np.array(tokens, dtype=np.int64)
