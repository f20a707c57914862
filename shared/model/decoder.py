"""The language model: token ids and media embeddings in, logits out.

One decoder for the Llama-like families; what differs between them is in `TextSpec`. The loop over
layers belongs to the caller if it wants it: `begin`, any number of `forward_layers`, `finish`;
layer-wise KV transfer and suspension between layers need that. The model does not know requests,
stages or how blocks are allocated.

Source: Meng et al. 2024 (DeepStack, section 3.2), features added after the first layers.
"""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import nn
from torch.nn import functional

from shared.cache.kv_cache import KvCache
from shared.model.attention import AttentionBackend, SdpaAttention
from shared.model.batch import ForwardBatch
from shared.model.checkpoint import Destination
from shared.model.decoder_layer import DecoderLayer, Stream
from shared.model.gpu.parts import whole
from shared.model.kernels.paired import PairedKernel
from shared.model.linear import ChooseKernel, FusedLinear, LinearKernel, Rows
from shared.model.norm import norm_of
from shared.model.rope import Rotary, RotaryEmbedding
from shared.model.step import LastTokens, StepContext
from shared.modelspec import TextSpec

__all__ = ["LanguageModel", "StepContext"]


class LanguageModel(nn.Module):
    """Embedding, decoder layers, final norm and output head. Weights come from the loader."""

    def __init__(
        self, spec: TextSpec, dtype: torch.dtype, *, backend: AttentionBackend | None = None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.dtype = dtype
        self.backend: AttentionBackend = backend or SdpaAttention()
        self.embed_weight = nn.Parameter(
            torch.empty(spec.vocab_size, spec.hidden_size, dtype=dtype), requires_grad=False
        )
        self.layers = nn.ModuleList(DecoderLayer(spec, i, dtype) for i in range(spec.num_layers))
        self.norm = norm_of(spec, spec.hidden_size, dtype)
        head = {"lm_head": spec.vocab_size}
        self.lm_head = (
            None
            if spec.tie_word_embeddings
            else FusedLinear(spec.hidden_size, head, bias=False, dtype=dtype)
        )
        # Rounded to the model's dtype, as the weights that it multiplies are.
        scale = torch.tensor(spec.embedding_scale, dtype=dtype, device="cpu")
        self._embedding_scale = float(scale)
        # DeepStack adds to rows behind its layers, which may be all where there are very few.
        self._ends_plainly = spec.num_deepstack_layers < spec.num_layers
        self._tied_head: LinearKernel | None = None
        self._ropes: tuple[RotaryEmbedding, ...] | None = None

    @torch.inference_mode()
    def forward(
        self, batch: ForwardBatch, kv: KvCache, *, all_positions: bool = False
    ) -> torch.Tensor:
        """One whole step. Logits `[num_seqs, vocab]` of each sequence's last token.

        With `all_positions`, `[num_tokens, vocab]`. Writes the KV of all new tokens into `kv`.
        """
        step = self.begin(batch, kv, all_positions=all_positions)
        hidden = self.embed(batch)
        hidden = self.forward_layers(hidden, step, kv, 0, self.spec.num_layers)
        return self.finish(hidden, step)

    @torch.inference_mode()
    def begin(
        self, batch: ForwardBatch, kv: KvCache, *, all_positions: bool = False
    ) -> StepContext:
        """Work out once what every layer of this step needs."""
        has_media = batch.media_index is not None
        if self.spec.bidirectional_media and has_media and batch.attend_stops is None:
            raise ValueError("media of this model needs bidirectional_spans, and none are given")
        rotaries, windows = self.rotaries(batch.positions), self.spec.sliding_windows
        plan = self.backend.plan(batch, kv, windows)
        last = None
        if not all_positions and batch.num_tokens > batch.num_seqs and self._ends_plainly:
            last_plan = self.backend.plan(batch.last_tokens(), kv, windows)
            last = LastTokens(batch.cu_seqlens_q[1:] - 1, last_plan)
        return StepContext(batch, rotaries, plan, last, all_positions)

    @torch.inference_mode()
    def rotaries(self, positions: torch.Tensor) -> tuple[Rotary, ...]:
        """One per kind of rotation at `positions` `[num_tokens]` or `[3, num_tokens]`."""
        if self._ropes is None:
            self._ropes = tuple(
                RotaryEmbedding(rope, self.spec.head_dim, positions.device)
                for rope in self.spec.ropes
            )
        return tuple(rope.at(positions, self.dtype) for rope in self._ropes)

    @torch.inference_mode()
    def embed(self, batch: ForwardBatch) -> torch.Tensor:
        """Input embeddings `[num_tokens, hidden]`, media rows replaced."""
        token_ids, rows = batch.token_ids, self._media_vectors(batch, 0)
        if batch.media_index is not None:
            # A placeholder's own embedding is not used, and its id may lie outside the vocabulary.
            token_ids = token_ids.index_fill(0, batch.media_index, 0)
        hidden = functional.embedding(token_ids, self.embed_weight)
        if self._embedding_scale != 1.0:
            hidden = hidden * self._embedding_scale
        if batch.media_index is not None and rows is not None:
            hidden.index_copy_(0, batch.media_index, rows)
        return hidden

    @torch.inference_mode()
    def forward_layers(
        self, hidden: torch.Tensor, step: StepContext, kv: KvCache, start: int, stop: int
    ) -> torch.Tensor:
        """Layers `start .. stop` on `hidden` `[num_tokens, hidden]`.

        Running `0..n` at once or in pieces gives bit-equal results. Of the last layer come only
        `step.last` where that is given, `[num_seqs, hidden]`.
        """
        stream = Stream(hidden)
        for index in range(start, stop):
            last = step.last if index == self.spec.num_layers - 1 else None
            stream = self.layers[index].forward(stream, step, kv, last)
            if index < self.spec.num_deepstack_layers and step.batch.media_index is not None:
                features = self._media_vectors(step.batch, index + 1)
                if features is not None:
                    hidden = stream.sum()
                    hidden.index_add_(0, step.batch.media_index, features)
                    stream = Stream(hidden)
        return stream.sum()

    @torch.inference_mode()
    def finish(self, hidden: torch.Tensor, step: StepContext) -> torch.Tensor:
        """Final norm and output head; `[num_seqs, vocab]`, or `[num_tokens, vocab]`."""
        if not step.all_positions and hidden.shape[0] > step.batch.num_seqs:
            hidden = hidden[step.batch.cu_seqlens_q[1:] - 1]
        hidden = self.norm.forward(hidden)
        if self.lm_head is not None:
            return whole(self.lm_head.in_parts(hidden))
        if self._tied_head is not None:
            return self._tied_head.run(hidden, None)
        return functional.linear(hidden, self.embed_weight)

    def prepare_linears(
        self, choose: ChooseKernel, choose_head: ChooseKernel | None = None
    ) -> list[LinearKernel]:
        """Give every linear map its kernel, once the weights are loaded.

        `choose_head` is for the output head, which sees the last row of each sequence alone.
        """
        maps = [module for module in self.layers.modules() if isinstance(module, FusedLinear)]
        kernels = [linear.prepare(choose) for linear in maps if not linear.decides]
        choose_head = choose_head or choose
        if self.lm_head is not None:
            return [*kernels, self.lm_head.prepare(choose_head)]
        # The embedding reads single rows of the same weight, so that stays as it is.
        self._tied_head = choose_head(self.embed_weight.data)
        return [*kernels, self._tied_head]

    def expect(self, rows: Rows) -> None:
        """Which steps come from now on: kernels may keep their weights in other forms for them."""
        for module in self.layers.modules():
            if isinstance(module, FusedLinear) and isinstance(module.kernel, PairedKernel):
                module.kernel.expect(rows)

    def _media_vectors(self, batch: ForwardBatch, index: int) -> torch.Tensor | None:
        """Vector `index` of each media row, `[num_media_rows, hidden]`: 0 is the embedding."""
        rows = batch.media_embeddings
        if rows is None:
            return None
        if rows.shape[1] != self.spec.embedding_width:
            raise ValueError(
                f"media embeddings of width {rows.shape[1]}; "
                f"this model takes {self.spec.embedding_width}"
            )
        width = self.spec.hidden_size
        return rows[:, index * width : (index + 1) * width].to(self.dtype)

    def checkpoint_views(self, names: Container[str] = ()) -> dict[str, Destination]:
        """Every checkpoint name of the language part and what it fills.

        `names` are those of the checkpoint; they decide where there is more than one layout.
        """
        views: dict[str, Destination] = {
            "embed_tokens.weight": self.embed_weight,
            "norm.weight": self.norm.weight,
        }
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            views.update(layer.checkpoint_views(f"layers.{index}.", names))
        if self.lm_head is not None:
            views.update(self.lm_head.checkpoint_views(""))
        return views
