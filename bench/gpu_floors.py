"""The least time that a step can take: its bytes over the bandwidth, its operations over the peak.

In: shapes, and what a device was measured to do. Out: seconds. Weights are counted from the modules
themselves; a product of `m x k` by `k x n` counts `2 m k n`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bench.gpu_timing import median_s
from shared.cache.geometry import KvGeometry
from shared.model.decoder import LanguageModel

COPIED_BYTES = 4 << 30
MATRIX_SIDE = 8192


@dataclass(frozen=True)
class Device:
    """Bytes per second, read and written together, and bfloat16 operations per second."""

    bytes_per_s: float
    flops: float

    @classmethod
    def measure(cls) -> Device:
        """A large copy and a large matrix product."""
        source = torch.ones(COPIED_BYTES // 2, dtype=torch.bfloat16, device="cuda")
        target = torch.empty_like(source)
        copy_s = median_s(lambda: target.copy_(source), 10)
        a = torch.randn(MATRIX_SIDE, MATRIX_SIDE, dtype=torch.bfloat16, device="cuda")
        product_s = median_s(lambda: a @ a, 20)
        return cls(2 * COPIED_BYTES / copy_s, 2 * MATRIX_SIDE**3 / product_s)


def matrix_weights(module: nn.Module) -> int:
    """Elements of all matrices that activations are multiplied by, hence without embeddings."""
    return sum(
        parameter.numel()
        for name, parameter in module.named_parameters()
        if parameter.ndim > 1 and "embed_weight" not in name
    )


def decode_floor_s(
    model: LanguageModel, geometry: KvGeometry, num_seqs: int, context_tokens: int, device: Device
) -> float:
    """Weights once, every context once; or the products, where a batch makes them the longer."""
    weights = matrix_weights(model)
    num_bytes = 2 * weights + num_seqs * context_tokens * geometry.bytes_per_token
    return max(num_bytes / device.bytes_per_s, 2 * weights * num_seqs / device.flops)


def prefill_floor_s(model: LanguageModel, num_tokens: int, device: Device) -> float:
    """All layers for all tokens, causal attention, the output head for the last token only."""
    spec = model.spec
    head = spec.hidden_size * spec.vocab_size
    layers = matrix_weights(model) - head
    # Scores and weighted values: two products over half of all pairs of tokens.
    attention = 2 * num_tokens**2 * spec.num_heads * spec.head_dim * spec.num_layers
    return (2 * layers * num_tokens + 2 * head + attention) / device.flops


def tower_floor_s(
    module: nn.Module, config: Any, grid: tuple[int, int], num_pictures: int, device: Device
) -> float:
    """All layers for all patches; attention within windows, and over the picture in some layers."""
    patches = grid[0] * grid[1]
    merger = sum(p.numel() for n, p in module.named_parameters() if "merger" in n and p.ndim > 1)
    layers = matrix_weights(module) - merger
    merged = patches // config.spatial_merge_size**2
    window = (config.window_size // config.patch_size) ** 2
    num_full = len(config.fullatt_block_indexes)
    pairs = patches * (num_full * patches + (config.depth - num_full) * window)
    flops = 2 * layers * patches + 2 * merger * merged + 4 * pairs * config.hidden_size
    return float(num_pictures * flops / device.flops)
