"""M-RoPE positions against transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.model.positions import MediaGrid, mrope_positions
from shared.modelspec import ModelSpec
from tests.support.models import (
    IMAGE_TOKEN,
    VIDEO_TOKEN,
    VISION_END,
    VISION_FAMILIES,
    VISION_START,
    load_reference,
)

LAYOUTS: dict[str, list[MediaGrid | None]] = {
    "one picture": [MediaGrid(1, 6, 4)],
    "picture first": [None, MediaGrid(1, 2, 10)],
    "three pictures": [MediaGrid(1, 2, 2), MediaGrid(1, 8, 4), MediaGrid(1, 4, 14)],
    "clip": [MediaGrid(4, 4, 6, seconds_per_frame=1.0)],
    "slow clip": [MediaGrid(3, 6, 2, seconds_per_frame=2.5)],
    "picture and clips": [
        MediaGrid(1, 4, 4),
        MediaGrid(2, 4, 4, seconds_per_frame=0.7),
        MediaGrid(3, 2, 6, seconds_per_frame=1.0),
    ],
}


@pytest.mark.parametrize("family", VISION_FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_positions_equal_transformers(
    family: str, layout: str, model_dir_of: Callable[[str], Path]
) -> None:
    spec = ModelSpec.load(model_dir_of(family)).vision
    assert spec is not None
    grids = [grid for grid in LAYOUTS[layout] if grid is not None]
    token_ids = [] if LAYOUTS[layout][0] is None else [5, 6, 7]
    for i, grid in enumerate(grids):
        token = VIDEO_TOKEN if grid.is_video else IMAGE_TOKEN
        run = [token] * spec.num_tokens((grid.t, grid.h, grid.w))
        token_ids += [*run, VISION_END, *range(20, 20 + i), VISION_START]
    positions, next_pos = mrope_positions(token_ids, grids, spec)

    ids = torch.tensor([token_ids])
    images = [(grid.t, grid.h, grid.w) for grid in grids if not grid.is_video]
    clips = [grid for grid in grids if grid.is_video]
    reference = load_reference(family, model_dir_of(family), torch.float32)
    expected, deltas = reference.model.get_rope_index(
        ids,
        (ids == IMAGE_TOKEN).int() + 2 * (ids == VIDEO_TOKEN).int(),
        image_grid_thw=torch.tensor(images) if images else None,
        video_grid_thw=torch.tensor([(c.t, c.h, c.w) for c in clips]) if clips else None,
        second_per_grid_ts=torch.tensor([c.seconds_per_frame for c in clips]) if clips else None,
    )
    np.testing.assert_array_equal(positions, expected[:, 0].numpy())
    assert next_pos == len(token_ids) + int(deltas[0, 0])
