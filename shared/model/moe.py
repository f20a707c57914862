"""A mixture of experts in place of a layer's MLP.

In: activations of packed tokens. Out: activations of the same shape. Tokens are sorted by expert,
so each expert runs once over exactly its tokens: nothing is padded and no expert computes a token
that it was not chosen for.

Source: Shazeer et al. 2017 (sparsely gated mixture of experts, section 2.1).
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import cast

import torch
from torch import nn

from shared.model import norm
from shared.model.checkpoint import Destination
from shared.model.linear import FusedLinear
from shared.model.mlp import GatedMlp
from shared.modelspec import MoeSpec, TextSpec


class MixtureOfExperts(nn.Module):
    """Router and experts of one layer."""

    def __init__(self, spec: TextSpec, moe: MoeSpec, dtype: torch.dtype) -> None:
        super().__init__()
        self.moe = moe
        parts = {"gate": moe.num_experts}
        self.router = FusedLinear(spec.hidden_size, parts, bias=False, dtype=dtype, decides=True)
        self.experts = nn.ModuleList(
            GatedMlp(spec.hidden_size, moe.intermediate_size, spec.activation, dtype)
            for _ in range(moe.num_experts)
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` `[num_tokens, hidden]` in and out."""
        weights, chosen = self._route(hidden)
        num_chosen = self.moe.experts_per_token
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=self.moe.num_experts).tolist()
        gathered = hidden[order // num_chosen]
        outputs = torch.empty_like(gathered)
        start = 0
        for expert, count in enumerate(counts):
            if count:
                rows = slice(start, start + count)
                outputs[order[rows]] = self._expert(expert).forward(gathered[rows])
                start += count
        per_token = outputs.view(-1, num_chosen, hidden.shape[-1])
        return (per_token * weights[:, :, None]).sum(dim=1)

    def _route(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and ids of each token's experts, both `[num_tokens, experts_per_token]`."""
        logits = self.router.forward(hidden)
        probabilities = logits.softmax(dim=-1, dtype=norm.accumulation_dtype(logits.dtype))
        weights, chosen = probabilities.topk(self.moe.experts_per_token, dim=-1)
        if self.moe.normalize_weights:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.to(hidden.dtype), chosen

    def _expert(self, index: int) -> GatedMlp:
        return cast(GatedMlp, self.experts[index])

    def checkpoint_views(
        self, prefix: str, names: Container[str]
    ) -> Iterator[tuple[str, Destination]]:
        """Expert by expert, or stacked over experts where `names` has it so."""
        yield from self.router.checkpoint_views(prefix)
        experts = [self._expert(i) for i in range(self.moe.num_experts)]
        if f"{prefix}experts.gate_up_proj" in names:
            yield f"{prefix}experts.gate_up_proj", tuple(e.gate_up.weight for e in experts)
            yield f"{prefix}experts.down_proj", tuple(e.down.weight for e in experts)
            return
        for i, expert in enumerate(experts):
            yield from expert.checkpoint_views(f"{prefix}experts.{i}.")
