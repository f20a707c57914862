"""A patch tower made quick on a GPU: joined products, attention in one call, compiled layers.

In: a tower of transformers with its weights. Out: the same tower, computing the same by other
kernels. Layers of one kind are compiled once, for any number of patches, and torch keeps the result
on disk for the next start.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from shared.model.gpu import varlen
from shared.model.towers.joined_mlp import JoinedMlp


def quicken(module: nn.Module, *, compiles: bool) -> bool:
    """Change the tower `module` in place; its parameters' names are others afterwards.

    Returns whether its layers will be compiled, if `compiles`: not those that attend sequence by
    sequence, as they ask the device for lengths in between.
    """
    config: Any = module.config
    is_packed = varlen.has_varlen() and next(module.parameters()).dtype in varlen.DTYPES
    if is_packed:
        config._attn_implementation = varlen.IMPLEMENTATION
    compiles = compiles and is_packed
    for layer in _layers(module):
        if hasattr(layer.mlp, "gate_proj"):
            layer.mlp = JoinedMlp(layer.mlp)
        if compiles:
            layer.forward = torch.compile(layer.forward, dynamic=True)
    return compiles


def uncompile(module: nn.Module) -> None:
    """Back to layers as they are, where compiling turned out not to work."""
    for layer in _layers(module):
        vars(layer).pop("forward", None)


def _layers(module: nn.Module) -> Iterator[Any]:
    blocks = module.blocks
    assert isinstance(blocks, nn.ModuleList)
    yield from blocks
