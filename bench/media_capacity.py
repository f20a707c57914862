"""How many pictures a request may hold, and an encode batch, in a fixed memory per worker.

Nothing is computed: the allocators of production are asked (block pool, embedding pool, landing
budget, KV geometry), at the sizes of published models; weights and the tower's pass come from the
modules on torch's meta device (`bench/memory_model.py`).

As published: a worker may use 0.9 of 80 GB, 80 % of what its weights leave is KV cache, the rest is
for pictures, and all pictures of a request (or of a batch) pass the tower at once. Encode with
prefill in one process against encode apart. The context length of the model is not looked at. Our
own encoder passes pictures in batches of bounded size, which lets both sides hold more: its figures
stand in the last column pair, ratio included. A batch is of requests of ten pictures. The largest
ratios come last; 0 of a kind that does not fit at all gives no ratio.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.delayed.report import plot_bars, table
from bench.memory_model import BLOCK_SIZE, CONFIGS, TILE_PATCHES, TILE_TOKENS, Sizes, sizes_of
from services.encoder.settings import EncoderSettings
from shared.cache.block_pool import BlockPool
from shared.cache.embedding_pool import EmbeddingPool
from shared.errors import OutOfBlocks, SettingsError
from shared.runtime.kv_memory import num_kv_blocks
from shared.transport.landing_budget import LandingBudget

WORKER_BYTES = int(0.9 * 80e9)
KV_SHARE = 0.8
PICTURES_OF_A_BATCHED_REQUEST = 10
PICTURES = {"4032x3024": 13, "787x444": 3}
"""Size -> tiles, the small picture of the whole included."""


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes for KV cache and for pictures in a worker beside its weights; 0 where it has none."""

    kv_bytes: int
    media_bytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a request's pictures are embedded, and where its prompt is computed."""

    encode: Room
    prefill: Room
    is_one_process: bool


@dataclass(frozen=True, slots=True)
class Row:
    """A model and a size of picture: together, apart, for three measures."""

    model: str
    size: str
    pictures: tuple[int, int]
    batch: tuple[int, int]
    pictures_in_passes: tuple[int, int]


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m bench media_capacity", description=__doc__)
    parser.add_argument("--out", type=Path, help="write a plot into this PNG file")
    options = parser.parse_args()
    rows = [row for name in CONFIGS for row in rows_of(sizes_of(name))]
    if options.out:
        plot_bars(
            options.out,
            [f"{row.model.split()[0]}, {row.size}" for row in rows],
            {
                "encode with prefill": [row.pictures[0] for row in rows],
                "encode apart": [row.pictures[1] for row in rows],
            },
            title="Pictures in one request",
            y_label="pictures",
        )
    print(report(rows))


def rows_of(sizes: Sizes) -> list[Row]:
    """One for each size of picture."""
    together, apart = together_layout(sizes), apart_layout(sizes)
    rows = []
    for size, tiles in PICTURES.items():
        counts = [counts_of(sizes, layout, tiles) for layout in (together, apart)]
        pictures, batch, in_passes = zip(*counts, strict=True)
        rows.append(Row(sizes.name, size, pictures, batch, in_passes))
    return rows


def counts_of(sizes: Sizes, layout: Layout, tiles: int) -> tuple[int, int, int]:
    """Pictures of a request in one pass, requests of a batch, pictures in bounded passes."""
    longest_pass = max(tiles, EncoderSettings().max_batch_patches // TILE_PATCHES)

    def at_once(count: int) -> bool:
        return fits_request(sizes, layout, count, tiles, count * tiles)

    def in_batch(count: int) -> bool:
        return fits_batch(sizes, layout, count, tiles)

    def in_passes(count: int) -> bool:
        return fits_request(sizes, layout, count, tiles, min(count * tiles, longest_pass))

    return most(at_once), most(in_batch), most(in_passes)


def together_layout(sizes: Sizes) -> Layout:
    """Encode and prefill in one process; it decodes elsewhere."""
    room = room_beside(sizes.vision_bytes + sizes.language_bytes, has_kv=True)
    return Layout(room, room, is_one_process=True)


def apart_layout(sizes: Sizes) -> Layout:
    """A process each."""
    return Layout(
        room_beside(sizes.vision_bytes, has_kv=False),
        room_beside(sizes.language_bytes, has_kv=True),
        is_one_process=False,
    )


def room_beside(weight_bytes: int, *, has_kv: bool) -> Room:
    """What the weights leave of a worker's memory."""
    free_bytes = WORKER_BYTES - weight_bytes
    kv_bytes = int(KV_SHARE * free_bytes) if has_kv else 0
    return Room(kv_bytes, free_bytes - kv_bytes)


def fits_request(
    sizes: Sizes, layout: Layout, num_pictures: int, tiles: int, pass_tiles: int
) -> bool:
    """Whether a request's pictures can be embedded, moved and prefilled."""
    item_bytes = tiles * TILE_TOKENS * sizes.embedding_bytes_per_token
    pool_bytes = layout.encode.media_bytes - sizes.encode_bytes(pass_tiles)
    if not _pool_holds(pool_bytes, [item_bytes] * num_pictures):
        return False
    # One process hands its embeddings over where they lie; another needs memory to land them in.
    if not layout.is_one_process and not _lands(
        layout.prefill.media_bytes, num_pictures * item_bytes
    ):
        return False
    return _has_blocks(sizes, layout.prefill.kv_bytes, num_pictures * tiles * TILE_TOKENS)


def fits_batch(sizes: Sizes, layout: Layout, num_requests: int, tiles: int) -> bool:
    """Whether so many requests of ten pictures can be embedded in one pass."""
    num_pictures = num_requests * PICTURES_OF_A_BATCHED_REQUEST
    item_bytes = tiles * TILE_TOKENS * sizes.embedding_bytes_per_token
    pool_bytes = layout.encode.media_bytes - sizes.encode_bytes(num_pictures * tiles)
    return _pool_holds(pool_bytes, [item_bytes] * num_pictures)


def most(fits: Callable[[int], bool]) -> int:
    """The largest count that fits; more never fits where less does not."""
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _pool_holds(pool_bytes: int, items: Sequence[int]) -> bool:
    if pool_bytes < 1 or items[0] > pool_bytes:
        return False
    pool: EmbeddingPool[int] = EmbeddingPool(pool_bytes)
    return all(pool.try_reserve(str(index), size) for index, size in enumerate(items))


def _lands(landing_bytes: int, num_bytes: int) -> bool:
    return num_bytes <= landing_bytes and LandingBudget(landing_bytes).try_reserve("r", num_bytes)


def _has_blocks(sizes: Sizes, kv_bytes: int, num_tokens: int) -> bool:
    try:
        pool = BlockPool(num_kv_blocks(sizes.geometry, kv_bytes), BLOCK_SIZE)
        with pool.allocate(sizes.geometry.blocks_for(num_tokens)):
            return True
    except (OutOfBlocks, SettingsError):
        return False


def report(rows: Sequence[Row]) -> str:
    """A line for each, the largest ratios last."""
    head = (
        "together -> apart, 72 GB a worker",
        "pictures of a request",
        "ratio",
        "batch of requests",
        "ratio",
        "pictures, bounded passes",
        "ratio",
    )
    cells = [
        (
            f"{row.model.split()[0]}, {row.size}",
            *(
                cell
                for pair in (row.pictures, row.batch, row.pictures_in_passes)
                for cell in (f"{pair[0]} -> {pair[1]}", _ratio(pair))
            ),
        )
        for row in rows
    ]
    best = [
        max(pair[1] / pair[0] for pair in pairs if pair[0])
        for pairs in ([row.pictures for row in rows], [row.batch for row in rows])
    ]
    return (
        f"{table(head, cells)}\n"
        f"largest ratios: pictures of a request {best[0]:.1f} (published: 10), "
        f"encode batch {best[1]:.1f} (published: 22)"
    )


def _ratio(pair: tuple[int, int]) -> str:
    return f"{pair[1] / pair[0]:.1f}" if pair[0] else "-"


if __name__ == "__main__":
    main()
