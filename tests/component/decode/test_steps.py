"""What computes a worker's plain decode steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.decode.settings import DecodeSettings
from services.decode.steps import decode_steps, graph_limits
from shared.cache.block_pool import BlockPool
from shared.cache.kv_cache import KvCache
from shared.demo import model_dir
from shared.model.recorded_steps import RecordedSteps
from shared.modelspec import ModelSpec
from shared.runtime.host import ModelFolder
from shared.runtime.language import Language, load_language
from shared.runtime.settings import load_settings


def settings_of(*arguments: str) -> DecodeSettings:
    return load_settings(DecodeSettings, list(arguments), "decode")


def test_a_cpu_records_steps_and_needs_no_spare_block() -> None:
    folder = ModelFolder(Path(model_dir()), ModelSpec.load(model_dir()), "float32", "cpu")
    model, kv = load_language(folder, block_size=16, num_blocks=8)
    language = Language(model, kv, BlockPool(8, 16))
    assert kv.num_blocks == 8
    assert language.scratch_block_id is None
    assert isinstance(decode_steps(language, settings_of()), RecordedSteps)


def test_the_spare_block_is_one_that_the_pool_does_not_have() -> None:
    folder = ModelFolder(Path(model_dir()), ModelSpec.load(model_dir()), "float32", "cpu")
    model, kv = load_language(folder, block_size=16, num_blocks=8)
    language = Language(model, KvCache(kv.geometry, 9), BlockPool(8, 16))
    assert language.scratch_block_id == 8


@pytest.mark.parametrize(
    ("arguments", "cache_tokens", "max_batch", "max_context_tokens", "max_bytes"),
    [
        ((), 1 << 20, 64, 8192, 2 << 30),
        (("--max-batch", "3"), 4096, 3, 4096, 2 << 30),
        (("--graph-context-tokens", "100", "--graph-bytes", "1MiB"), 4096, 64, 100, 1 << 20),
    ],
)
def test_graphs_hold_what_the_worker_takes(
    arguments: tuple[str, ...],
    cache_tokens: int,
    max_batch: int,
    max_context_tokens: int,
    max_bytes: int,
) -> None:
    limits = graph_limits(settings_of(*arguments), cache_tokens)
    assert (limits.max_batch, limits.max_context_tokens) == (max_batch, max_context_tokens)
    assert limits.max_bytes == max_bytes
