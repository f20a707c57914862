"""The shape of a KV cache in numbers.

In: a model's layer and head counts, a block size and a dtype name. Out: bytes and block counts,
and the hash that two workers compare before they exchange blocks. Knows neither torch nor owners.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from shared.errors import SettingsError
from shared.modelspec import TextSpec

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

# Bumped whenever the meaning of a block's bytes changes.
KV_LAYOUT = "layers,kv,blocks,block_size,kv_heads,head_dim/v1"


@dataclass(frozen=True, slots=True)
class KvGeometry:
    """Layers, KV heads, head width, tokens per block and dtype name of a paged KV cache."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise SettingsError(f"KV dtype {self.dtype!r} is not one of {sorted(DTYPE_BYTES)}")
        if min(self.num_layers, self.num_kv_heads, self.head_dim, self.block_size) < 1:
            raise SettingsError(f"KV geometry has a size below 1: {self}")

    @classmethod
    def of(cls, text: TextSpec, *, block_size: int, dtype: str) -> KvGeometry:
        """The geometry that a language model needs."""
        return cls(text.num_layers, text.num_kv_heads, text.head_dim, block_size, dtype)

    @property
    def bytes_per_token_layer(self) -> int:
        """Bytes of one token's key and value in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return self.num_layers * self.bytes_per_token_layer

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block in all layers."""
        return self.block_size * self.bytes_per_token

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens; 0 for 0."""
        return -(-num_tokens // self.block_size)

    def blocks_in(self, kv_bytes: int) -> int:
        """Whole blocks that fit into a memory budget."""
        return kv_bytes // self.bytes_per_block

    def compatibility_hash(self, model_fingerprint: str) -> str:
        """Equal exactly where KV blocks may be exchanged as plain bytes (hex, 32 characters)."""
        text = (
            f"{KV_LAYOUT}|{model_fingerprint}|{self.num_layers}|{self.num_kv_heads}"
            f"|{self.head_dim}|{self.block_size}|{self.dtype}"
        )
        return hashlib.sha256(text.encode()).hexdigest()[:32]
