"""What was recorded for each size of a ladder, and which of it a step takes.

In: sizes and how to record one. Out: recordings by size. Knows neither steps nor graphs.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from shared.cache.kv_cache import KvCache

logger = logging.getLogger(__name__)

R = TypeVar("R")


class Recordings(Generic[R]):
    """Sizes for which `record` gives None, as there is no memory, are told of and left out.

    `unit` names what a size counts, `max_bytes` is the limit that the log mentions.
    """

    def __init__(
        self, sizes: Iterable[int], record: Callable[[int], R | None], unit: str, max_bytes: int
    ) -> None:
        self._recordings: dict[int, R] = {}
        # Large ones first: small ones can use their memory.
        for size in sorted(sizes, reverse=True):
            recording = record(size)
            if recording is None:
                logger.warning(
                    "no CUDA graph for %d %s: not within %d bytes, or no memory",
                    size,
                    unit,
                    max_bytes,
                )
            else:
                self._recordings[size] = recording
        self.sizes = tuple(sorted(self._recordings))

    def holding(self, count: int) -> tuple[int, R] | None:
        """The smallest size that is not below `count`, and what was recorded for it."""
        place = bisect_left(self.sizes, count)
        if place == len(self.sizes):
            return None
        size = self.sizes[place]
        return size, self._recordings[size]


def check_scratch_block(kv: KvCache, block_id: int) -> None:
    """Raises `ValueError` unless the cache has such a block."""
    if not 0 <= block_id < kv.num_blocks:
        raise ValueError(f"scratch block {block_id} of {kv.num_blocks} blocks")
