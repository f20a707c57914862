"""What computes a step: the language model, or something quicker that gives the same."""

from __future__ import annotations

from typing import Protocol

import torch

from shared.cache.kv_cache import KvCache
from shared.model.batch import ForwardBatch
from shared.model.step import StepContext
from shared.modelspec import TextSpec


class ForwardStep(Protocol):
    """Called like the model."""

    def __call__(self, batch: ForwardBatch, kv: KvCache) -> torch.Tensor:
        """Logits `[num_seqs, vocab]` of each sequence's last token; writes the new tokens' KV."""
        ...


class LayeredModel(Protocol):
    """The same in pieces: the loop over layers is the caller's. See `LanguageModel`."""

    @property
    def spec(self) -> TextSpec:
        """Numbers of layers and their sizes."""
        ...

    def begin(self, batch: ForwardBatch, kv: KvCache) -> StepContext:
        """Work out once what every layer of this step needs."""
        ...

    def embed(self, batch: ForwardBatch) -> torch.Tensor:
        """Input embeddings `[num_tokens, hidden]`, media rows replaced."""
        ...

    def forward_layers(
        self, hidden: torch.Tensor, step: StepContext, kv: KvCache, start: int, stop: int
    ) -> torch.Tensor:
        """Layers `start .. stop`. `hidden` is what the layer before gave, or `embed`."""
        ...

    def finish(self, hidden: torch.Tensor, step: StepContext) -> torch.Tensor:
        """Logits `[num_seqs, vocab]` of each sequence's last token."""
        ...
