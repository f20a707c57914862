"""Norms of a tower, by our kernels.

In: modules of transformers with their weights. Out: the same modules, whose root-mean-square norms
are ours.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from shared.model.norm import RmsNorm


def take_norms(module: nn.Module) -> None:
    """Replace them in place, wherever they are."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "variance_epsilon"):
                setattr(parent, name, _norm_like(child))


def _norm_like(norm: Any) -> RmsNorm:
    made = RmsNorm(norm.weight.shape[0], norm.variance_epsilon, norm.weight.dtype)
    made.weight = norm.weight
    return made
