"""How many KV blocks a memory setting buys."""

from __future__ import annotations

from shared.cache.geometry import KvGeometry
from shared.errors import SettingsError


def num_kv_blocks(geometry: KvGeometry, kv_bytes: int) -> int:
    """Whole blocks in `kv_bytes`; `SettingsError` if not one fits."""
    num_blocks = geometry.blocks_in(kv_bytes)
    if num_blocks < 1:
        raise SettingsError(
            f"--kv-bytes = {kv_bytes}: one block of this model takes "
            f"{geometry.bytes_per_block} bytes"
        )
    return num_blocks
