"""Sizes asked of the meta device are those of real memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench import memory_model
from bench.encoder_memory import encoder_parts, monolith_parts
from bench.media_capacity import apart_layout, counts_of, fits_request, together_layout
from bench.memory_model import CONFIGS, Sizes, parameter_bytes, peak_bytes, sizes_of
from shared.cache.kv_cache import KvCache
from shared.demo import model_dir
from shared.model.loader import load_language_model


@pytest.fixture(scope="module")
def large() -> Sizes:
    return sizes_of(list(CONFIGS)[-1])


def test_weights_are_those_of_the_published_model(large: Sizes) -> None:
    assert large.language_bytes == pytest.approx(2 * 19.9e9, rel=0.01)
    assert large.vision_bytes == pytest.approx(2 * 5.6e9, rel=0.02)


def test_a_loaded_model_has_the_bytes_that_are_counted() -> None:
    model = load_language_model(model_dir())
    stored = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()
    }
    assert parameter_bytes(model) == sum(stored.values())


class _Doubler(nn.Module):
    """Keeps input, one copy and one sum alive at its peak."""

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        copy = tiles * 2
        total = tiles + copy
        del copy
        return total[:, :1] * 1.0


def test_the_peak_counts_what_is_alive_at_once() -> None:
    tile_bytes = 2 * 3 * memory_model.IMAGE_SIZE**2
    assert peak_bytes(_Doubler(), 4) == 4 * tile_bytes * 3


def test_a_cache_on_the_meta_device_is_as_large_as_a_real_one(large: Sizes) -> None:
    real, counted = (KvCache(large.geometry, 3, device=device) for device in ("cpu", "meta"))
    assert real.data.nbytes == counted.data.nbytes == 3 * large.geometry.bytes_per_block


def test_an_encoder_has_neither_language_weights_nor_kv(large: Sizes) -> None:
    encoder, monolith = encoder_parts(large), monolith_parts(large, 4096)
    assert set(monolith) - set(encoder) == {"language weights", "KV cache"}
    assert monolith["KV cache"] == 64 * 4096 * large.geometry.bytes_per_token


def test_one_more_picture_than_the_most_does_not_fit(large: Sizes) -> None:
    for layout in (together_layout(large), apart_layout(large)):
        count, _, _ = counts_of(large, layout, 13)
        assert fits_request(large, layout, count, 13, 13 * count)
        assert not fits_request(large, layout, count + 1, 13, 13 * (count + 1))
