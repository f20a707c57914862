"""The gateway and the Qwen-VL image processor must agree on every size."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from shared.errors import RequestFailed
from shared.media.sizing.grid import GridSizing
from shared.modelspec import ModelSpec
from shared.runtime.settings import DEMO_MODEL

SIDES = st.one_of(st.integers(1, 200), st.integers(1, 6000))
SETTINGS = st.sampled_from(
    [
        {"patch_size": 14, "merge_size": 2},
        {"patch_size": 14, "merge_size": 2, "min_pixels": 3136, "max_pixels": 50176},
        {"patch_size": 16, "merge_size": 2, "min_pixels": 65536, "max_pixels": 16777216},
        {"patch_size": 14, "merge_size": 2, "min_pixels": 200704, "max_pixels": 1003520},
    ]
)


@settings(max_examples=4000, deadline=None)
@given(SIDES, SIDES, SETTINGS)
def test_equals_the_image_processor(height, width, kwargs):
    sizer, processor = GridSizing(**kwargs), Qwen2VLImageProcessorPil(**kwargs)
    if max(height, width) / min(height, width) > 200:
        with pytest.raises(RequestFailed, match="aspect ratio"):
            sizer.measure(height, width)
        with pytest.raises(ValueError, match="aspect ratio"):
            processor.get_number_of_image_patches(height, width)
        return
    size = sizer.measure(height, width)
    num_patches = processor.get_number_of_image_patches(height, width)
    assert size.grid_thw[1] * size.grid_thw[2] == num_patches
    assert size.num_tokens == num_patches // kwargs["merge_size"] ** 2


@pytest.mark.parametrize("shape", [(28, 28), (100, 300), (333, 77), (640, 480), (1, 150)])
def test_equals_the_grid_of_a_real_picture(shape):
    height, width = shape
    processor = Qwen2VLImageProcessorPil.from_pretrained(DEMO_MODEL)
    picture = Image.fromarray(np.zeros((height, width, 3), np.uint8))
    grid = processor(images=[picture], return_tensors="np")["image_grid_thw"][0]
    vision = ModelSpec.load(DEMO_MODEL).vision
    assert vision.sizing.measure(height, width).grid_thw == tuple(grid)
