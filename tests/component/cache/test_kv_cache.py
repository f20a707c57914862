"""The paged tensor: write by slot, gather and scatter by block list."""

from __future__ import annotations

import pytest
import torch

from shared.cache.geometry import KvGeometry
from shared.cache.kv_cache import KvCache

GEOMETRY = KvGeometry(num_layers=3, num_kv_heads=2, head_dim=4, block_size=4, dtype="float32")


@pytest.fixture
def values() -> torch.Tensor:
    """Ten tokens, `[3, 2, 10, 2, 4]`."""
    return torch.randn(3, 2, 10, 2, 4, generator=torch.Generator().manual_seed(0))


def test_gather_returns_what_scatter_wrote(values: torch.Tensor) -> None:
    kv = KvCache(GEOMETRY, 8)
    kv.scatter([6, 1, 3], values)
    out = kv.gather([6, 1, 3], 10)
    assert torch.equal(out, values)
    assert out.is_contiguous()
    assert torch.equal(kv.gather([6, 1, 3], 7), values[:, :, :7])


def test_write_by_slot_is_what_gather_reads(values: torch.Tensor) -> None:
    kv = KvCache(GEOMETRY, 8)
    slots = kv.slots_of([5, 0, 2], 10)
    assert slots.tolist() == [20, 21, 22, 23, 0, 1, 2, 3, 8, 9]
    for layer in range(3):
        kv.write(layer, slots, values[layer, 0], values[layer, 1])
    assert torch.equal(kv.gather([5, 0, 2], 10), values)


def test_layer_groups_move_on_their_own(values: torch.Tensor) -> None:
    kv = KvCache(GEOMETRY, 8)
    kv.data.zero_()
    kv.scatter([2, 4, 6], values[1:], slice(1, 3))
    assert torch.equal(kv.gather([2, 4, 6], 10, slice(1, 3)), values[1:])
    assert not kv.gather([2, 4, 6], 10, slice(0, 1)).any()


def test_scatter_in_two_pieces(values: torch.Tensor) -> None:
    kv = KvCache(GEOMETRY, 8)
    kv.scatter([2, 4, 6], values[:, :, :3])
    kv.scatter([2, 4, 6], values[:, :, 3:], start=3)
    assert torch.equal(kv.gather([2, 4, 6], 10), values)


def test_other_blocks_stay_untouched(values: torch.Tensor) -> None:
    kv = KvCache(GEOMETRY, 8)
    kv.data.fill_(7.0)
    kv.scatter([1, 2, 3], values)
    assert bool((kv.data[:, :, [0, 4, 5, 6, 7]] == 7.0).all())


def test_too_many_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="9 tokens do not fit into 2 blocks of 4"):
        KvCache(GEOMETRY, 8).gather([0, 1], 9)


def test_wrong_shapes_and_dtypes_are_refused(values: torch.Tensor) -> None:
    kv = KvCache(GEOMETRY, 8)
    with pytest.raises(ValueError, match="scatter: got"):
        kv.scatter([0, 1, 2], values[:2])
    with pytest.raises(ValueError, match="scatter: got"):
        kv.scatter([0, 1, 2], values.double())
