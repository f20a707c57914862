"""The language part of a model with its KV cache, as prefill and decode both need it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from shared.cache.block_pool import BlockPool
from shared.cache.kv_cache import KvCache
from shared.messages.control import Role
from shared.model.batch_invariant import invariant_kernels, make_batch_invariant
from shared.model.cpu_attention import CpuAttention
from shared.model.decoder import LanguageModel
from shared.model.linear import Rows
from shared.model.loader import load_language_model
from shared.runtime.hand_over import HandOver
from shared.runtime.host import ModelFolder, weights_progress
from shared.runtime.kv_memory import num_kv_blocks
from shared.runtime.topology import in_order, name_of
from shared.runtime.worker import Worker
from shared.telemetry.metrics import watch_kv_usage

NUM_SCRATCH_BLOCKS = {"cuda": 1}
"""By device."""


def load_language(
    folder: ModelFolder, block_size: int, num_blocks: int, rows: Rows = Rows.BOTH
) -> tuple[LanguageModel, KvCache]:
    """Read the folder's language weights, and only those, and make an empty cache. Blocks.

    On a GPU the cache has a block more, for rows of CUDA graphs that no sequence fills.
    """
    kernels = replace(folder.kernels, rows=rows)
    if folder.deterministic:
        kernels = invariant_kernels(folder.spec.text, folder.device, folder.dtype, kernels)
    model = load_language_model(
        folder.directory,
        folder.spec,
        dtype=folder.dtype,
        device=folder.device,
        backend=CpuAttention(folder.geometry(block_size)) if folder.device == "cpu" else None,
        kernels=kernels,
        on_progress=weights_progress(),
    )
    if folder.deterministic:
        make_batch_invariant(model)
    num_blocks += NUM_SCRATCH_BLOCKS.get(folder.device, 0)
    return model, KvCache(folder.geometry(block_size), num_blocks, device=folder.device)


@dataclass(frozen=True)
class Language:
    """The language model of one process, loaded once, for each stage that computes with it.

    `hand_over` joins prefill and decode where the process hosts both.
    """

    model: LanguageModel
    kv: KvCache
    pool: BlockPool
    hand_over: HandOver | None = None

    @property
    def scratch_block_id(self) -> int | None:
        """A block of the cache that the pool never gives to anybody, where there is one."""
        return self.pool.num_blocks if self.kv.num_blocks > self.pool.num_blocks else None


async def open_language(
    worker: Worker, folder: ModelFolder, *, block_size: int, kv_bytes: int
) -> Language:
    """Load it for a worker and meter its cache. Raises `TriptychError`."""
    num_blocks = num_kv_blocks(folder.geometry(block_size), kv_bytes)
    rows = rows_of(worker.stages)
    model, kv = await worker.compute(load_language, folder, block_size, num_blocks, rows)
    return join_language(worker, Language(model, kv, BlockPool(num_blocks, block_size)))


async def keep_language(worker: Worker, language: Language) -> Language:
    """The same model, cache and blocks in another role, its weights in the form for that."""
    await worker.compute(language.model.expect, rows_of(worker.stages))
    return join_language(worker, language)


def rows_of(stages: Collection[Role]) -> Rows:
    """What the steps of these stages bring at a time."""
    if Role.PREFILL not in stages:
        return Rows.FEW
    return Rows.BOTH if Role.DECODE in stages else Rows.MANY


def join_language(worker: Worker, language: Language) -> Language:
    """The same model, cache and blocks, for the stages that the worker hosts now.

    Blocks that are leased to others stay so, whichever stage exposed them.
    """
    stages = in_order({Role.PREFILL, Role.DECODE} & set(worker.stages))
    pool, name = language.pool, name_of(stages)
    pool.name = f"{name} KV"
    watch_kv_usage(worker.registry, name, lambda: pool.num_used / pool.num_blocks)
    return replace(language, hand_over=HandOver(pool) if len(stages) > 1 else None)
