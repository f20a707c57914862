"""Into which pieces a prompt's KV is divided, so that it can travel while it is computed.

In: the way of transfer, the prompt's length, what of it is cached, and the sizes of the model. Out:
where ranges of tokens and groups of layers begin. A piece is neither so small that its message
costs more than its bytes, nor are there more than a few dozens. Pure: no torch, no clock, no bus.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from shared.cache.geometry import KvGeometry

KvTransfer = Literal["whole", "per-chunk", "layer-wise"]

MIN_PIECE_BYTES = 256 * 1024
"""Copying this much takes about as long as asking for it."""

MAX_RANGES = 32
MAX_GROUPS = 32


@dataclass(frozen=True, slots=True)
class PiecePlan:
    """How prompts are divided. `chunk_tokens`: those of one prompt in one forward pass; 0: all."""

    transfer: KvTransfer
    geometry: KvGeometry
    chunk_tokens: int = 0
    min_piece_bytes: int = MIN_PIECE_BYTES

    @property
    def is_early(self) -> bool:
        """Whether a decoder is asked before the prompt is computed."""
        return self.transfer != "whole"

    def is_divided(self, num_tokens: int) -> bool:
        """Whether the KV of a prompt of which nothing is cached would be more than one piece."""
        return bool(self.token_cuts(num_tokens, 0) or self.layer_cuts(num_tokens, 0))

    def token_cuts(self, num_tokens: int, num_cached: int) -> tuple[int, ...]:
        """Where the second and later ranges of tokens begin: cached ones, then each chunk."""
        if not self.is_early:
            return ()
        pending = num_tokens - num_cached
        size = self.chunk_tokens // self.geometry.block_size * self.geometry.block_size
        size = max(size or self.chunk_tokens, 1) if self.chunk_tokens else pending
        smallest = -(-self.min_piece_bytes // self.geometry.bytes_per_token)
        for least in (smallest, -(-pending // (MAX_RANGES - 1))):
            size *= max(1, -(-least // size))
        starts = range(num_cached, num_tokens, size)
        return tuple(start for start in starts if start)

    def layer_cuts(self, num_tokens: int, num_cached: int) -> tuple[int, ...]:
        """Where the second and later groups of layers begin."""
        if self.transfer != "layer-wise":
            return ()
        cuts = self.token_cuts(num_tokens, num_cached)
        # The longest range decides: the last may be a few tokens, and is soon through anyway.
        bounds = (0, *cuts, num_tokens)
        longest = max(high - low for low, high in pairwise(bounds))
        num_layers = self.geometry.num_layers
        bytes_per_layer = longest * self.geometry.bytes_per_token_layer
        size = max(-(-self.min_piece_bytes // bytes_per_layer), -(-num_layers // MAX_GROUPS))
        return tuple(range(size, num_layers, size))
