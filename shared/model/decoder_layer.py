"""One decoder layer: attention and MLP, each normalised and added to the residual stream.

In: hidden states of a packed step. Out: hidden states. Knows its own index and nothing of the
layers around it.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import NamedTuple

import torch
from torch import nn

from shared.cache.kv_cache import KvCache
from shared.model.checkpoint import Destination
from shared.model.gpu.parts import Parts, whole
from shared.model.mlp import GatedMlp
from shared.model.moe import MixtureOfExperts
from shared.model.norm import RmsNorm, norm_of, residual_sum
from shared.model.self_attention import SelfAttention
from shared.model.step import LastTokens, StepContext
from shared.modelspec import TextSpec


class Stream(NamedTuple):
    """The residual stream behind a layer: its sum up to there, and what the layer adds to it.

    The sum of both belongs to the next norm, which on a GPU is one kernel with it.
    """

    hidden: torch.Tensor
    pending: torch.Tensor | Parts | None = None

    def normed(self, norm: RmsNorm) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole sum, and its normalisation."""
        if self.pending is None:
            return self.hidden, norm.forward(self.hidden)
        return norm.add(self.hidden, self.pending)

    def sum(self) -> torch.Tensor:
        """The whole sum."""
        return self.hidden if self.pending is None else residual_sum(self.hidden, self.pending)


class DecoderLayer(nn.Module):
    """Norms stand before each block, and in some families behind it too."""

    def __init__(self, spec: TextSpec, layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.attention = SelfAttention(spec, layer, dtype)
        self.mlp: GatedMlp | MixtureOfExperts = (
            MixtureOfExperts(spec, spec.moe, dtype)
            if spec.moe is not None and spec.layers[layer].is_moe
            else GatedMlp(spec.hidden_size, spec.intermediate_size, spec.activation, dtype)
        )
        self.input_norm = norm_of(spec, spec.hidden_size, dtype)
        self.mlp_norm = norm_of(spec, spec.hidden_size, dtype)
        self.attention_out_norm = (
            norm_of(spec, spec.hidden_size, dtype) if spec.post_norms else None
        )
        self.mlp_out_norm = norm_of(spec, spec.hidden_size, dtype) if spec.post_norms else None

    def forward(
        self, stream: Stream, step: StepContext, kv: KvCache, last: LastTokens | None = None
    ) -> Stream:
        """`[num_tokens, hidden]` in and out; with `last` only these rows come out, while the keys
        and values of all are written."""
        hidden, normed = stream.normed(self.input_norm)
        attended = self.attention.forward(normed, step, kv, last)
        if last is not None:
            hidden = hidden[last.rows]
        if self.attention_out_norm is not None:
            attended = self.attention_out_norm.forward(whole(attended))
        hidden, normed = self.mlp_norm.add(hidden, attended)
        transformed: torch.Tensor | Parts = (
            self.mlp.in_parts(normed)
            if isinstance(self.mlp, GatedMlp)
            else self.mlp.forward(normed)
        )
        if self.mlp_out_norm is not None:
            transformed = self.mlp_out_norm.forward(whole(transformed))
        return Stream(hidden, transformed)

    def checkpoint_views(
        self, prefix: str, names: Container[str]
    ) -> Iterator[tuple[str, Destination]]:
        yield from self.attention.checkpoint_views(f"{prefix}self_attn.")
        if isinstance(self.mlp, MixtureOfExperts):
            yield from self.mlp.checkpoint_views(f"{prefix}mlp.", names)
        else:
            yield from self.mlp.checkpoint_views(f"{prefix}mlp.")
        yield f"{prefix}input_layernorm.weight", self.input_norm.weight
        if self.attention_out_norm is None or self.mlp_out_norm is None:
            yield f"{prefix}post_attention_layernorm.weight", self.mlp_norm.weight
            return
        yield f"{prefix}post_attention_layernorm.weight", self.attention_out_norm.weight
        yield f"{prefix}pre_feedforward_layernorm.weight", self.mlp_norm.weight
        yield f"{prefix}post_feedforward_layernorm.weight", self.mlp_out_norm.weight
