"""A minimal driver of the engine for tests: no service, no scheduler, one process.

In: a model folder and prompts. Out: logits, in any chunking and batching the test wants.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from shared.cache.block_pool import BlockHandle, BlockPool
from shared.cache.geometry import KvGeometry
from shared.cache.kv_cache import KvCache
from shared.messages.descriptor import MediaItem
from shared.model.batch import ForwardBatch, SequenceInput
from shared.model.loader import load_language_model, load_tower
from shared.model.positions import MediaGrid, media_spans, prompt_positions
from shared.model.towers.base import TowerInput
from shared.modelspec import ModelSpec
from tests.support.models import Prompt


@dataclass(eq=False)
class Running:
    """One prompt on its way: what is cached, what is still to be computed."""

    token_ids: np.ndarray
    positions: np.ndarray
    next_pos: int
    media_index: np.ndarray
    media_embeddings: torch.Tensor | None
    handle: BlockHandle
    num_cached_tokens: int = 0
    bidirectional_spans: tuple[tuple[int, int], ...] = ()

    @property
    def num_pending(self) -> int:
        return len(self.token_ids) - self.num_cached_tokens


class Engine:
    """Model, tower, cache and pool of one process."""

    def __init__(
        self, folder: Path, dtype: str, *, num_blocks: int = 128, block_size: int = 4
    ) -> None:
        self.spec = ModelSpec.load(folder)
        self.model = load_language_model(folder, self.spec, dtype=dtype)
        self.tower = load_tower(folder, self.spec, dtype=dtype) if self.spec.has_tower else None
        self.geometry = KvGeometry.of(self.spec.text, block_size=block_size, dtype=dtype)
        self.kv = KvCache(self.geometry, num_blocks)
        self.pool = BlockPool(num_blocks, block_size)

    def start(self, prompt: Prompt) -> Running:
        """Encode the pictures and allocate blocks; nothing is prefilled yet."""
        positions, next_pos = prompt_positions(prompt.token_ids, prompt.grids, self.spec)
        embeddings = None
        if prompt.pixel_values is not None:
            assert self.tower is not None
            embeddings = torch.cat(self.tower.encode(prompt.pixels))
        return self.start_embedded(
            prompt.token_ids, positions, next_pos, prompt.media_index, embeddings
        )

    def start_embedded(
        self,
        token_ids: np.ndarray,
        positions: np.ndarray,
        next_pos: int,
        media_index: np.ndarray,
        media_embeddings: torch.Tensor | None,
    ) -> Running:
        """Allocate blocks for a prompt whose media are embedded already."""
        spans = media_spans(media_index) if self.spec.text.bidirectional_media else ()
        return Running(
            token_ids,
            positions,
            next_pos,
            media_index,
            media_embeddings,
            self.pool.allocate(self.geometry.blocks_for(len(token_ids))),
            bidirectional_spans=spans,
        )

    def begin(
        self, token_ids: Sequence[int], media: Sequence[MediaItem], inputs: Sequence[TowerInput]
    ) -> Running:
        """The same for a prompt as the gateway builds it and media as the encoder gets them."""
        grids = [MediaGrid(*item.grid_thw, item.seconds_per_frame) for item in media]
        positions, next_pos = prompt_positions(token_ids, grids, self.spec)
        rows = [np.arange(start, stop) for item in media for start, stop in item.spans]
        media_index = np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)
        assert self.tower is not None
        embeddings = torch.cat(self.tower.encode(inputs)) if inputs else None
        return self.start_embedded(
            np.array(token_ids), positions, next_pos, media_index, embeddings
        )

    def append(self, running: Running, token: int) -> None:
        """A generated token becomes the next one to compute."""
        running.token_ids = np.append(running.token_ids, token)
        shape = (*running.positions.shape[:-1], 1)
        running.positions = np.concatenate(
            (running.positions, np.full(shape, running.next_pos)), axis=-1
        )
        running.next_pos += 1
        missing = self.geometry.blocks_for(len(running.token_ids)) - len(running.handle)
        running.handle.grow(missing)

    def step(
        self,
        batch: Sequence[Running],
        *,
        max_new_tokens: int | None = None,
        all_positions: bool = False,
    ) -> torch.Tensor:
        """Run up to `max_new_tokens` pending tokens of each sequence."""
        logits = self.model.forward(
            self.pack(batch, max_new_tokens), self.kv, all_positions=all_positions
        )
        for running in batch:
            running.num_cached_tokens += min(
                running.num_pending, max_new_tokens or running.num_pending
            )
        return logits

    def pack(self, batch: Sequence[Running], max_new_tokens: int | None = None) -> ForwardBatch:
        """The packed step that `step` runs."""
        inputs = [_input(running, max_new_tokens or running.num_pending) for running in batch]
        return ForwardBatch.pack(inputs, self.geometry.block_size)

    def greedy(self, running: Running, num_tokens: int) -> list[int]:
        """Prefill what is pending and generate greedily."""
        tokens = []
        for _ in range(num_tokens):
            tokens.append(int(self.step([running]).argmax()))
            self.append(running, tokens[-1])
        return tokens


def _input(running: Running, max_new_tokens: int) -> SequenceInput:
    start = running.num_cached_tokens
    stop = start + min(max_new_tokens, running.num_pending)
    inside = (running.media_index >= start) & (running.media_index < stop)
    embeddings = running.media_embeddings
    return SequenceInput(
        token_ids=running.token_ids[start:stop],
        positions=running.positions[..., start:stop],
        block_ids=running.handle.block_ids,
        num_cached_tokens=start,
        media_index=running.media_index[inside] - start,
        media_embeddings=None if embeddings is None else embeddings[torch.from_numpy(inside)],
        bidirectional_spans=running.bidirectional_spans,
    )
