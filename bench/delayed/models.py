"""A language model and a vision tower that take the time of real ones and compute nothing.

In: the steps that the executors give them. Out: zeros of the right shape, after the seconds that a
performance model predicts for the step; greedy sampling reads them as token 0. Weights are neither
read nor allocated. Keys and values are not written; the cache is real, and so is what moves it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from services.planner.perf_model import PerformanceModel
from shared.cache.kv_cache import TORCH_DTYPES, KvCache
from shared.model.batch import ForwardBatch
from shared.model.decoder import LanguageModel
from shared.model.step import StepContext
from shared.model.towers.base import VisionTower
from shared.model.towers.pixels import Pixels
from shared.model.vision.spec import VisionSpec
from shared.modelspec import ModelSpec, TextSpec


@dataclass(frozen=True, slots=True, eq=False)
class DelayedStep(StepContext):
    """A step and how long all of its layers take."""

    seconds: float


class DelayedLanguageModel(LanguageModel):
    """Sleeps in its layers, an equal share in each."""

    def __init__(self, spec: TextSpec, dtype: torch.dtype, timing: PerformanceModel) -> None:
        with torch.device("meta"):
            super().__init__(spec, dtype)
        self._timing = timing

    def begin(
        self, batch: ForwardBatch, kv: KvCache, *, all_positions: bool = False
    ) -> DelayedStep:
        plan: Any = None  # nothing attends
        seconds = step_seconds(self._timing, batch)
        return DelayedStep(batch, (), plan, None, all_positions, seconds)

    def embed(self, batch: ForwardBatch) -> torch.Tensor:
        return torch.zeros(batch.num_tokens, self.spec.hidden_size, dtype=self.dtype)

    def forward_layers(
        self, hidden: torch.Tensor, step: StepContext, kv: KvCache, start: int, stop: int
    ) -> torch.Tensor:
        assert isinstance(step, DelayedStep)
        time.sleep(step.seconds * (stop - start) / self.spec.num_layers)
        return hidden

    def finish(self, hidden: torch.Tensor, step: StepContext) -> torch.Tensor:
        num_rows = step.batch.num_tokens if step.all_positions else step.batch.num_seqs
        return torch.zeros(num_rows, self.spec.vocab_size, dtype=self.dtype)


class DelayedTower(VisionTower):
    """Sleeps once for a batch of pictures."""

    def __init__(
        self, spec: VisionSpec, width: int, dtype: torch.dtype, timing: PerformanceModel
    ) -> None:
        super().__init__(nn.Module(), spec)
        self._width, self._dtype, self._timing = width, dtype, timing

    @staticmethod
    def assemble(config: Any, family: Any) -> nn.Module:
        return nn.Module()

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def encode(self, pictures: Sequence[Pixels]) -> list[torch.Tensor]:
        time.sleep(self._timing.encode_s(sum(each.num_patches for each in pictures)))
        counts = [
            each.part.num_rows if each.part else self.spec.sizing.measure(*each.size).num_tokens
            for each in pictures
        ]
        return [torch.zeros(count, self._width, dtype=self._dtype) for count in counts]


def step_seconds(timing: PerformanceModel, batch: ForwardBatch) -> float:
    """One new token in each sequence is a decode step, anything else a prefill."""
    stops = batch.context_lens.tolist()
    lens = batch.cu_seqlens_q.diff().tolist()
    if max(lens) == 1:
        return timing.decode_s(sum(stops), len(stops))
    return timing.prefill_s((stop - length, stop) for stop, length in zip(stops, lens, strict=True))


@contextmanager
def delayed_models(timing: PerformanceModel) -> Iterator[None]:
    """Within, whatever this process loads is a delay."""
    import services.encoder.build
    import shared.runtime.language

    def language(folder: Path, spec: ModelSpec, *, dtype: str, **_: Any) -> LanguageModel:
        return DelayedLanguageModel(spec.text, TORCH_DTYPES[dtype], timing)

    def vision(folder: Path, spec: ModelSpec, *, dtype: str, **_: Any) -> VisionTower:
        assert spec.vision is not None, "a text-only model has no tower"
        return DelayedTower(spec.vision, spec.embedding_width, TORCH_DTYPES[dtype], timing)

    with (
        _replaced(shared.runtime.language, "load_language_model", language),
        _replaced(services.encoder.build, "load_tower", vision),
    ):
        yield


@contextmanager
def _replaced(module: ModuleType, name: str, value: object) -> Iterator[None]:
    """Raises `AttributeError` where the loader is no longer called by this module."""
    loader = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, loader)
