"""Bytes, block counts and compatibility."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.cache.geometry import KvGeometry
from shared.errors import SettingsError

GEOMETRY = KvGeometry(num_layers=24, num_kv_heads=2, head_dim=64, block_size=16, dtype="bfloat16")


def test_bytes() -> None:
    assert GEOMETRY.bytes_per_token_layer == 2 * 2 * 64 * 2
    assert GEOMETRY.bytes_per_token == 24 * 512
    assert GEOMETRY.bytes_per_block == 16 * 24 * 512
    assert GEOMETRY.blocks_in(GEOMETRY.bytes_per_block * 3 + 1) == 3


@given(num_tokens=st.integers(0, 10_000), block_size=st.integers(1, 256))
def test_blocks_hold_the_tokens_and_no_block_is_spare(num_tokens: int, block_size: int) -> None:
    blocks = dataclasses.replace(GEOMETRY, block_size=block_size).blocks_for(num_tokens)
    assert (
        blocks * block_size >= num_tokens > (blocks - 1) * block_size or num_tokens == blocks == 0
    )


@pytest.mark.parametrize(
    "other",
    [
        {"num_layers": 25},
        {"num_kv_heads": 4},
        {"head_dim": 128},
        {"block_size": 32},
        {"dtype": "float16"},
    ],
)
def test_every_field_changes_the_compatibility_hash(other: dict[str, int | str]) -> None:
    changed = dataclasses.replace(GEOMETRY, **other)  # type: ignore[arg-type]
    assert changed.compatibility_hash("model") != GEOMETRY.compatibility_hash("model")


def test_the_model_changes_the_compatibility_hash() -> None:
    assert GEOMETRY.compatibility_hash("a") != GEOMETRY.compatibility_hash("b")
    assert GEOMETRY.compatibility_hash("a") == GEOMETRY.compatibility_hash("a")


@pytest.mark.parametrize("wrong", [{"dtype": "int4"}, {"block_size": 0}])
def test_impossible_geometries_are_refused(wrong: dict[str, int | str]) -> None:
    with pytest.raises(SettingsError):
        dataclasses.replace(GEOMETRY, **wrong)  # type: ignore[arg-type]
