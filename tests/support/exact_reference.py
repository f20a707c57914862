"""transformers' language models without their roundings to float32.

In: a loaded reference. Out: the same object, whose norms and routers compute in the dtype of their
input. transformers rounds to float32 there, which hides everything below 1e-8. Only the language
part is touched: towers run the same transformers code on both sides.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import torch


def make_exact(reference: Any) -> None:
    """Let a float64 reference decoder normalise and route in float64."""
    language = getattr(reference.model, "language_model", reference.model)
    for module in language.modules():
        name = type(module).__name__
        if name.startswith("Gemma3") and name.endswith("RMSNorm"):
            module.forward = types.MethodType(_gemma_norm, module)
        elif name.endswith("RMSNorm"):
            module.forward = types.MethodType(_norm, module)
        elif name.endswith("TopKRouter"):
            module.forward = types.MethodType(_route, module)


def greedy_tokens(reference: Any, inputs: Mapping[str, torch.Tensor], num_tokens: int) -> list[int]:
    """What the reference's own `generate` adds to the inputs, without regard to end tokens."""
    with torch.no_grad():
        output = reference.generate(
            **inputs, do_sample=False, max_new_tokens=num_tokens, eos_token_id=-1, pad_token_id=2
        )
    token_ids: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
    assert len(token_ids) == num_tokens
    return token_ids


def _norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    variance = x.square().mean(-1, keepdim=True)
    normed: torch.Tensor = self.weight * (x * torch.rsqrt(variance + self.variance_epsilon))
    return normed


def _gemma_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    variance = x.square().mean(-1, keepdim=True)
    normed: torch.Tensor = x * torch.rsqrt(variance + self.eps) * (1.0 + self.weight)
    return normed


def _route(self: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = torch.nn.functional.linear(hidden.reshape(-1, self.hidden_dim), self.weight)
    weights, chosen = logits.softmax(-1).topk(self.top_k, dim=-1)
    # Qwen3-VL-MoE has no switch: its weights always add up to one.
    if getattr(self, "norm_topk_prob", True):
        weights = weights / weights.sum(-1, keepdim=True)
    return logits, weights, chosen
