"""Vision towers: pictures packed in one call, and what transformers' model makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shared.model.loader import load_tower
from shared.model.towers.pixels import Pixels
from shared.modelspec import ModelSpec
from tests.support.models import VISION_FAMILIES, Prompt, load_reference, make_prompt

GRIDS = ((4, 14), (2, 2), (10, 6))


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_packed_pictures_equal_single_ones(
    family: str, model_dir_of: Callable[[str], Path]
) -> None:
    tower = load_tower(model_dir_of(family), dtype="float64")
    prompt = make_prompt_for(family, model_dir_of)
    packed = tower.encode(prompt.pixels)
    assert [embedding.shape for embedding in packed] == [(14, 32), (1, 32), (15, 32)]
    for embedding, picture in zip(packed, prompt.pixels, strict=True):
        alone = tower.encode([picture])[0]
        assert float((alone - embedding).abs().max()) <= 1e-10


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_embeddings_equal_transformers(family: str, model_dir_of: Callable[[str], Path]) -> None:
    tower = load_tower(model_dir_of(family), dtype="float64")
    prompt = make_prompt_for(family, model_dir_of)
    assert prompt.pixel_values is not None
    reference = load_reference(family, model_dir_of(family), torch.float64)
    with torch.no_grad():
        features = reference.model.get_image_features(prompt.pixel_values.double(), prompt.grid_thw)
    ours = tower.encode(prompt.pixels)
    for mine, theirs in zip(ours, features.pooler_output, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


def test_wrong_patch_counts_are_refused(model_dir_of: Callable[[str], Path]) -> None:
    tower = load_tower(model_dir_of("qwen2_vl"))
    with pytest.raises(ValueError, match=r"pixel_values \[3, 96\] for grids of 4 patches"):
        tower.encode([Pixels(torch.zeros(3, 96), (1, 2, 2))])


def make_prompt_for(family: str, model_dir_of: Callable[[str], Path]) -> Prompt:
    return make_prompt(ModelSpec.load(model_dir_of(family)), 8, GRIDS, seed=5)
