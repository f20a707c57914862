"""The language model: token ids and media embeddings in, logits out.

One decoder for the Llama-like families; what differs between them is in `TextSpec`. The loop over
layers belongs to the caller if it wants it: `begin`, any number of `forward_layers`, `finish`;
layer-wise KV transfer and suspension between layers need that. The model does not know requests,
stages or how blocks are allocated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from shared.cache.kv_cache import KvCache
from shared.model.attention import AttentionBackend, AttentionPlan, SdpaAttention
from shared.model.batch import ForwardBatch
from shared.model.linear import ChooseKernel, FusedLinear, LinearKernel
from shared.model.norm import RmsNorm
from shared.model.rope import Rotary, RotaryEmbedding
from shared.modelspec import TextSpec


@dataclass(frozen=True, slots=True, eq=False)
class StepContext:
    """What all layers of one step share; valid while the batch's blocks stay where they are."""

    batch: ForwardBatch
    rotary: Rotary
    plan: AttentionPlan


class SelfAttention(nn.Module):
    """Projections, optional QK norm, rotation, cache write and attention of one layer."""

    def __init__(self, spec: TextSpec, layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = spec.num_heads
        self.num_kv_heads = spec.num_kv_heads
        self.head_dim = spec.head_dim
        q_width, kv_width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        parts = {"q_proj": q_width, "k_proj": kv_width, "v_proj": kv_width}
        self.qkv = FusedLinear(spec.hidden_size, parts, bias=spec.qkv_bias, dtype=dtype)
        self.o = FusedLinear(q_width, {"o_proj": spec.hidden_size}, bias=spec.o_bias, dtype=dtype)
        self.q_norm = RmsNorm(spec.head_dim, spec.rms_norm_eps, dtype) if spec.qk_norm else None
        self.k_norm = RmsNorm(spec.head_dim, spec.rms_norm_eps, dtype) if spec.qk_norm else None

    def forward(self, hidden: torch.Tensor, step: StepContext, kv: KvCache) -> torch.Tensor:
        """`hidden` `[num_tokens, hidden]` in and out; writes this layer's KV of the new tokens."""
        heads = self.qkv.forward(hidden).view(hidden.shape[0], -1, self.head_dim)
        rotated = step.rotary.rotate(self._normed(heads[:, : self.num_heads + self.num_kv_heads]))
        q, k = rotated[:, : self.num_heads], rotated[:, self.num_heads :]
        v = heads[:, self.num_heads + self.num_kv_heads :]
        kv.write(self.layer, step.batch.slot_mapping, k, v)
        return self.o.forward(step.plan.attend(self.layer, q, k, v, kv))

    def _normed(self, qk: torch.Tensor) -> torch.Tensor:
        if self.q_norm is None or self.k_norm is None:
            return qk
        q, k = qk[:, : self.num_heads], qk[:, self.num_heads :]
        return torch.cat((self.q_norm.forward(q), self.k_norm.forward(k)), dim=1)

    def checkpoint_views(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.qkv.checkpoint_views(prefix)
        yield from self.o.checkpoint_views(prefix)
        if self.q_norm is not None and self.k_norm is not None:
            yield f"{prefix}q_norm.weight", self.q_norm.weight
            yield f"{prefix}k_norm.weight", self.k_norm.weight


class GatedMlp(nn.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, spec: TextSpec, dtype: torch.dtype) -> None:
        super().__init__()
        width = spec.intermediate_size
        parts = {"gate_proj": width, "up_proj": width}
        self.gate_up = FusedLinear(spec.hidden_size, parts, bias=False, dtype=dtype)
        self.down = FusedLinear(width, {"down_proj": spec.hidden_size}, bias=False, dtype=dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up.forward(hidden).chunk(2, dim=-1)
        return self.down.forward(functional.silu(gate) * up)

    def checkpoint_views(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.gate_up.checkpoint_views(prefix)
        yield from self.down.checkpoint_views(prefix)


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, spec: TextSpec, layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.attention = SelfAttention(spec, layer, dtype)
        self.mlp = GatedMlp(spec, dtype)
        self.input_norm = RmsNorm(spec.hidden_size, spec.rms_norm_eps, dtype)
        self.mlp_norm = RmsNorm(spec.hidden_size, spec.rms_norm_eps, dtype)

    def forward(self, hidden: torch.Tensor, step: StepContext, kv: KvCache) -> torch.Tensor:
        hidden = hidden + self.attention.forward(self.input_norm.forward(hidden), step, kv)
        return hidden + self.mlp.forward(self.mlp_norm.forward(hidden))

    def checkpoint_views(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.attention.checkpoint_views(f"{prefix}self_attn.")
        yield from self.mlp.checkpoint_views(f"{prefix}mlp.")
        yield f"{prefix}input_layernorm.weight", self.input_norm.weight
        yield f"{prefix}post_attention_layernorm.weight", self.mlp_norm.weight


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
        self.norm = RmsNorm(spec.hidden_size, spec.rms_norm_eps, dtype)
        head = {"lm_head": spec.vocab_size}
        self.lm_head = (
            None
            if spec.tie_word_embeddings
            else FusedLinear(spec.hidden_size, head, bias=False, dtype=dtype)
        )
        self._tied_head: LinearKernel | None = None
        self._rope: RotaryEmbedding | None = None

    @torch.inference_mode()
    def forward(
        self, batch: ForwardBatch, kv: KvCache, *, all_positions: bool = False
    ) -> torch.Tensor:
        """One whole step. Logits `[num_seqs, vocab]` of each sequence's last token.

        With `all_positions`, `[num_tokens, vocab]`. Writes the KV of all new tokens into `kv`.
        """
        step = self.begin(batch, kv)
        hidden = self.embed(batch)
        hidden = self.forward_layers(hidden, step, kv, 0, self.spec.num_layers)
        return self.finish(hidden, step, all_positions=all_positions)

    @torch.inference_mode()
    def begin(self, batch: ForwardBatch, kv: KvCache) -> StepContext:
        """Work out once what every layer of this step needs."""
        if self._rope is None:
            self._rope = RotaryEmbedding(self.spec.rope, self.spec.head_dim, kv.device)
        rotary = self._rope.at(batch.positions, self.dtype)
        return StepContext(batch, rotary, self.backend.plan(batch, kv))

    @torch.inference_mode()
    def embed(self, batch: ForwardBatch) -> torch.Tensor:
        """Input embeddings `[num_tokens, hidden]`, media rows replaced."""
        hidden = functional.embedding(batch.token_ids, self.embed_weight)
        if batch.media_index is not None and batch.media_embeddings is not None:
            hidden.index_copy_(0, batch.media_index, batch.media_embeddings.to(hidden.dtype))
        return hidden

    @torch.inference_mode()
    def forward_layers(
        self, hidden: torch.Tensor, step: StepContext, kv: KvCache, start: int, stop: int
    ) -> torch.Tensor:
        """Layers `start .. stop` on `hidden` `[num_tokens, hidden]`.

        Running `0..n` at once or in pieces gives bit-equal results.
        """
        for index in range(start, stop):
            hidden = self.layers[index].forward(hidden, step, kv)
        return hidden

    @torch.inference_mode()
    def finish(
        self, hidden: torch.Tensor, step: StepContext, *, all_positions: bool = False
    ) -> torch.Tensor:
        """Final norm and output head; `[num_seqs, vocab]`, or `[num_tokens, vocab]`."""
        if not all_positions:
            hidden = hidden[step.batch.cu_seqlens_q[1:] - 1]
        hidden = self.norm.forward(hidden)
        if self.lm_head is not None:
            return self.lm_head.forward(hidden)
        if self._tied_head is not None:
            return self._tied_head.run(hidden, None)
        return functional.linear(hidden, self.embed_weight)

    def prepare_linears(self, choose: ChooseKernel) -> list[LinearKernel]:
        """Give every linear map its kernel, once the weights are loaded."""
        maps = [module for module in self.modules() if isinstance(module, FusedLinear)]
        kernels = [linear.prepare(choose) for linear in maps]
        if self.lm_head is None:
            # The embedding reads single rows of the same weight, so that stays as it is.
            self._tied_head = choose(self.embed_weight.data)
            kernels.append(self._tied_head)
        return kernels

    def checkpoint_views(self) -> dict[str, torch.Tensor]:
        """Every checkpoint name of the language part and the tensor it fills."""
        views: dict[str, torch.Tensor] = {
            "embed_tokens.weight": self.embed_weight,
            "norm.weight": self.norm.weight,
        }
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            views.update(layer.checkpoint_views(f"layers.{index}."))
        if self.lm_head is not None:
            views.update(self.lm_head.checkpoint_views(""))
        return views
