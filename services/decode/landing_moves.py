"""Landing memory for pieces of KV, and the way from there into their blocks.

In: a cache, and pieces that have arrived. Out: their blocks, written. The transport knows no
streams of a GPU: memory that it writes to must be free of queued work, and so must blocks that a
sequence joins a step with. Here everything happens on a stream of its own, and a move has ended
when it says so. Knows no transport and no tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from shared.cache.kv_cache import KvCache
from shared.messages.refs import KvPiece


class LandingMoves:
    """Of one cache. `empty` and `move` may be called from any thread."""

    def __init__(self, kv: KvCache) -> None:
        self._kv = kv
        self._stream: torch.cuda.Stream | None = None
        if kv.device.type == "cuda":
            # torch gives its own class no types.
            self._stream = torch.cuda.Stream(kv.device)  # type: ignore[no-untyped-call]

    def empty(self, piece: KvPiece) -> torch.Tensor:
        """Memory of one piece, `[layers, 2, num_tokens, kv_heads, head_dim]`, where nothing that
        was queued before is still at work."""
        geometry = self._kv.geometry
        num_layers = piece.last_layer - piece.first_layer
        shape = (num_layers, 2, piece.num_tokens, geometry.num_kv_heads, geometry.head_dim)
        with self._on_stream():
            return torch.empty(shape, dtype=self._kv.data.dtype, device=self._kv.device)

    def move(self, values: torch.Tensor, piece: KvPiece, block_ids: Sequence[int]) -> None:
        """Write a piece that has arrived. Blocks until it lies in its blocks."""
        if self._stream is not None:
            # Whoever had the blocks before may have asked for writes that are not done yet.
            self._stream.wait_stream(torch.cuda.default_stream(self._kv.device))
        with self._on_stream():
            self._kv.scatter(block_ids, values, piece.layers, start=piece.first_token)
        if self._stream is not None:
            self._stream.synchronize()

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
