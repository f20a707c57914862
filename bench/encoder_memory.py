"""What an encode worker holds in memory, against a process that hosts all stages.

Nothing is computed and no process is started: bytes come from the allocators of production (weights
by the modules, KV cache by `KvCache` and `num_kv_blocks`, embeddings by the pool's setting), built
at the sizes of a published model on torch's meta device (`bench/memory_model.py`). What real
processes of a small model hold is checked by `tests/e2e/test_memory.py`.

Both sides hold the same embedding pool and the same largest pass of the tower. Prints a table by
part, then the ratio of weights alone and of everything.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from bench.delayed.report import plot_bars, table
from bench.memory_model import CONFIGS, TILE_PATCHES, Sizes, sizes_of
from services.decode.settings import DecodeSettings
from services.encoder.settings import EncoderSettings
from shared.cache.kv_cache import KvCache
from shared.runtime.kv_memory import num_kv_blocks

GB = 1e9


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m bench encoder_memory", description=__doc__)
    parser.add_argument("--model", choices=CONFIGS, default=next(iter(CONFIGS)))
    parser.add_argument(
        "--context-tokens", type=int, default=4096, help="of each of the answers in KV (4096)"
    )
    parser.add_argument("--out", type=Path, help="write a plot into this PNG file")
    options = parser.parse_args()
    sizes = sizes_of(options.model)
    encoder = encoder_parts(sizes)
    monolith = monolith_parts(sizes, options.context_tokens)
    if options.out:
        plot_bars(
            options.out,
            list(monolith),
            {
                "all stages": [each / GB for each in monolith.values()],
                "encode": [encoder.get(part, 0) / GB for part in monolith],
            },
            title=f"Memory by part: {sizes.name}",
            y_label="GB",
        )
    print(report(sizes.name, encoder, monolith))


def encoder_parts(sizes: Sizes) -> dict[str, int]:
    """Bytes of an encode worker by part, at its default settings."""
    settings = EncoderSettings()
    return {
        "vision weights": sizes.vision_bytes,
        "embedding pool": settings.embedding_pool_bytes,
        "tower's pass": sizes.encode_bytes(settings.max_batch_patches // TILE_PATCHES),
    }


def monolith_parts(sizes: Sizes, context_tokens: int) -> dict[str, int]:
    """Bytes of a worker of all stages; its KV cache holds a full batch of such contexts."""
    num_tokens = DecodeSettings().max_batch * context_tokens
    geometry = sizes.geometry
    num_blocks = num_kv_blocks(geometry, geometry.bytes_per_token * num_tokens)
    cache = KvCache(geometry, num_blocks, device="meta")
    return {
        "language weights": sizes.language_bytes,
        "KV cache": cache.data.nbytes,
        **encoder_parts(sizes),
    }


def report(name: str, encoder: Mapping[str, int], monolith: Mapping[str, int]) -> str:
    """A line for each part, the ratios last."""
    rows = [
        (part, f"{num_bytes / GB:.2f}", f"{encoder.get(part, 0) / GB:.2f}")
        for part, num_bytes in monolith.items()
    ]
    totals = sum(monolith.values()), sum(encoder.values())
    rows.append(("all", f"{totals[0] / GB:.2f}", f"{totals[1] / GB:.2f}"))
    weights = monolith["language weights"] + monolith["vision weights"]
    return "\n".join(
        (
            table((f"{name}, GB", "all stages", "encode"), rows),
            f"weights alone: {weights / encoder['vision weights']:.1f} times less on an encoder",
            f"weights and caches: {totals[0] / totals[1]:.1f} times less on an encoder "
            "(published: 15)",
        )
    )


if __name__ == "__main__":
    main()
