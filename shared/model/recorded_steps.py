"""Decode steps on a CPU, each kind recorded once and then one call.

In: a packed step and the cache. Out: logits, as from the model itself and equal to the last bit,
since the same kernels run on the same numbers. A step of one token per sequence is copied into the
memory of a recording with as many rows; any other step, and every step of a model that needs more
than compiled kernels, is the model's own. Knows neither requests nor sampling.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import replace

import torch

from shared.cache.kv_cache import KvCache
from shared.model.batch import ForwardBatch
from shared.model.decoder import LanguageModel
from shared.model.kernels.choice import has_compiled_kernels
from shared.model.kernels.narrow import MAX_COMPILED_ROWS
from shared.model.kernels.tape import NotRecordable, record

logger = logging.getLogger(__name__)

MIN_BLOCKS = 16
"""Tables of a recording have room for so many blocks, or for a power of two of them."""

MAX_BYTES = 256 * 1024 * 1024
"""Recordings hold the activations of all layers; the least recently used go, but for the newest."""


class RecordedSteps:
    """A model's decode steps over one cache. Calls must come from one thread at a time.

    The model's weights must stay where they are: after `LanguageModel.expect` it takes a new one.
    """

    def __init__(self, model: LanguageModel, kv: KvCache, *, max_bytes: int = MAX_BYTES) -> None:
        self._model = model
        self._kv = kv
        self._max_bytes = max_bytes
        self._recordings: OrderedDict[tuple[int, int], _Recording] = OrderedDict()
        self._is_recordable = (
            kv.device.type == "cpu" and kv.data.dtype == torch.bfloat16 and has_compiled_kernels()
        )
        self.num_recorded = 0
        self.num_replayed = 0

    @property
    def num_bytes(self) -> int:
        """What the recordings hold."""
        return sum(each.num_bytes for each in self._recordings.values())

    @torch.inference_mode()
    def __call__(self, batch: ForwardBatch, kv: KvCache) -> torch.Tensor:
        """Logits `[num_seqs, vocab]` of each sequence's last token; writes the new tokens' KV."""
        if not (self._is_recordable and _is_plain(batch)) or kv is not self._kv:
            return self._usual(batch, kv)
        size = batch.num_seqs, max(MIN_BLOCKS, _power_of_two(batch.block_tables.shape[1]))
        found = self._recordings.get(size)
        if found is None:
            return self._record(batch, *size)
        self._recordings.move_to_end(size)
        self.num_replayed += 1
        return found.replay(batch)

    def _usual(self, batch: ForwardBatch, kv: KvCache) -> torch.Tensor:
        logits: torch.Tensor = self._model(batch, kv)
        return logits

    def _record(self, batch: ForwardBatch, num_seqs: int, num_blocks: int) -> torch.Tensor:
        try:
            recording = _Recording(self._model, self._kv, batch, num_blocks)
        except NotRecordable as error:
            logger.info("decode steps are not recorded: %s is no compiled kernel", error)
            self._is_recordable = False
            return self._usual(batch, self._kv)
        self.num_recorded += 1
        self._recordings[num_seqs, num_blocks] = recording
        while len(self._recordings) > 1 and self.num_bytes > self._max_bytes:
            self._recordings.popitem(last=False)
        return recording.logits.clone()


class _Recording:
    """One step's memory, and the tape that computes on it."""

    def __init__(
        self, model: LanguageModel, kv: KvCache, batch: ForwardBatch, num_blocks: int
    ) -> None:
        self._model = model
        tables = torch.zeros(batch.num_seqs, num_blocks, dtype=torch.int64)
        tables[:, : batch.block_tables.shape[1]] = batch.block_tables
        self._batch = replace(
            batch,
            slot_mapping=batch.slot_mapping.clone(),
            context_lens=batch.context_lens.clone(),
            block_tables=tables,
        )
        self._step = model.begin(self._batch, kv)
        self._hidden = model.embed(batch)

        def compute() -> torch.Tensor:
            hidden = model.forward_layers(self._hidden, self._step, kv, 0, len(model.layers))
            return model.finish(hidden, self._step)

        self._tape, self.logits = record(compute)
        self.num_bytes = self._tape.num_bytes

    def replay(self, batch: ForwardBatch) -> torch.Tensor:
        """Logits of another step with as many sequences; a copy, as the next goes to the same
        memory."""
        mine = self._batch
        mine.slot_mapping.copy_(batch.slot_mapping)
        mine.context_lens.copy_(batch.context_lens)
        mine.block_tables[:, : batch.block_tables.shape[1]].copy_(batch.block_tables)
        self._hidden.copy_(self._model.embed(batch))
        rotaries = self._model.rotaries(batch.positions)
        for place, rotary in zip(self._step.rotaries, rotaries, strict=True):
            place.cos.copy_(rotary.cos)
            place.sin_signed.copy_(rotary.sin_signed)
        self._tape.play()
        return self.logits.clone()


def _is_plain(batch: ForwardBatch) -> bool:
    """One token for each of a few sequences, without media."""
    return (
        batch.num_tokens == batch.num_seqs <= MAX_COMPILED_ROWS
        and batch.positions.ndim == 1
        and batch.media_index is None
        and batch.attend_stops is None
    )


def _power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()
