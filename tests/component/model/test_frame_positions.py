"""Positions of clips whose frames stand apart (Qwen3-VL), against transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

from shared.model.positions import MediaGrid, prompt_positions
from shared.modelspec import ModelSpec
from tests.support.models import IMAGE_TOKEN, MEDIA_TOKENS, VIDEO_TOKEN, VISION_END, VISION_START

LAYOUTS = {
    "picture": [MediaGrid(1, 6, 4)],
    "clip": [MediaGrid(3, 4, 6, seconds_per_frame=0.5)],
    "clips and pictures": [
        MediaGrid(2, 4, 4, seconds_per_frame=1.0),
        MediaGrid(1, 2, 8),
        MediaGrid(1, 6, 2, seconds_per_frame=2.0),
        MediaGrid(1, 8, 8),
    ],
}


@pytest.fixture(scope="module")
def reference() -> Qwen3VLModel:
    config = Qwen3VLConfig(
        text_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        vision_config={"depth": 1, "spatial_merge_size": 2, "deepstack_visual_indexes": []},
        **MEDIA_TOKENS,
    )
    with torch.device("meta"):
        return Qwen3VLModel(config)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_positions_equal_transformers(
    layout: str, reference: Qwen3VLModel, model_dir_of: Callable[[str], Path]
) -> None:
    spec = ModelSpec.load(model_dir_of("qwen2_vl"))
    spec = replace(spec, text=replace(spec.text, mrope_per_frame=True))
    grids = LAYOUTS[layout]
    token_ids = [5, 6, 7]
    for grid in grids:
        token = VIDEO_TOKEN if grid.is_video else IMAGE_TOKEN
        for frame in range(grid.t):
            # A frame's time as text, of another length each time.
            run = [token] * (grid.h * grid.w // 4)
            token_ids += [*range(20, 22 + frame), VISION_START, *run, VISION_END]
    positions, next_pos = prompt_positions(token_ids, grids, spec)

    ids = torch.tensor([token_ids])
    images = [(grid.t, grid.h, grid.w) for grid in grids if not grid.is_video]
    clips = [(grid.t, grid.h, grid.w) for grid in grids if grid.is_video]
    expected, deltas = reference.get_rope_index(
        ids,
        (ids == IMAGE_TOKEN).int() + 2 * (ids == VIDEO_TOKEN).int(),
        image_grid_thw=torch.tensor(images) if images else None,
        video_grid_thw=torch.tensor(clips) if clips else None,
    )
    np.testing.assert_array_equal(positions, expected[:, 0].numpy())
    assert next_pos == len(token_ids) + int(deltas[0, 0])
