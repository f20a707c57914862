"""Tiles and placeholders of any picture size, against transformers' image processors."""

from __future__ import annotations

import types
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from transformers.image_processing_utils import select_best_resolution
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import (
    Idefics3ImageProcessorPil,
    get_resize_output_image_size,
)
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.llava_onevision.processing_llava_onevision import (
    LlavaOnevisionProcessor,
)

from shared.errors import RequestFailed
from shared.media.sizing.anyres import AnyresSizing
from shared.media.sizing.base import MAX_ASPECT_RATIO, ImageSizing
from shared.media.sizing.canvas import CanvasSizing
from shared.media.sizing.fixed import FixedSizing
from shared.media.sizing.split import SplitSizing

SIDES = st.one_of(st.integers(1, 300), st.integers(1, 6000))
EXAMPLES = settings(max_examples=400, deadline=None)
NEXT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def is_extreme(height: int, width: int) -> bool:
    return max(height, width) / min(height, width) > MAX_ASPECT_RATIO


@EXAMPLES
@given(SIDES, SIDES, st.sampled_from([(448, 1, 12), (448, 1, 6), (28, 2, 9), (16, 1, 1)]))
def test_canvas(height: int, width: int, case: tuple[int, int, int]) -> None:
    side, low, high = case
    if is_extreme(height, width):
        return
    sizing = CanvasSizing(side, 256, low, high, "<img>", "</img>")
    processor = GotOcr2ImageProcessorPil(
        size={"height": side, "width": side}, min_patches=low, max_patches=high
    )
    expected = processor.get_number_of_image_patches(height, width, {"crop_to_patches": True})
    layout = sizing.measure(height, width)
    assert layout.num_tiles == expected
    assert layout.pieces == ("<img>", 256 * expected, "</img>")


class SizesOnly(Idefics3ImageProcessorPil):
    """The real splitting over pictures that are views of one pixel."""

    def resize(self, image: np.ndarray, size: Any, **_: Any) -> np.ndarray:
        if size.longest_edge:
            shape = get_resize_output_image_size(image, size.longest_edge)
        else:
            shape = (size.height, size.width)
        return np.broadcast_to(np.uint8(0), (3, *shape))


@EXAMPLES
@given(
    SIDES, SIDES, st.sampled_from([(364, 1456), (512, 2048), (384, 1536), (16, 48), (512, 9000)])
)
def test_split(height: int, width: int, case: tuple[int, int]) -> None:
    tile, longest = case
    if is_extreme(height, width):
        return
    processor = SizesOnly(size={"longest_edge": longest}, max_image_size={"longest_edge": tile})
    image = processor.resize(np.broadcast_to(np.uint8(0), (3, height, width)), processor.size)
    image = processor.resize_for_vision_encoder(image, tile)
    frames, rows, columns = processor.split_images(image, {"longest_edge": tile})
    layout = SplitSizing(tile, 64, longest, splits=True).measure(height, width)
    assert layout.grid_thw == (1, rows, columns)
    assert layout.num_tiles == len(frames)
    assert layout.num_tokens == 64 * len(frames)


def anyres_self(cls: type, pinpoints: list[list[int]], **fields: Any) -> Any:
    """What the processors' counting reads of themselves."""
    one = types.SimpleNamespace(
        image_processor=types.SimpleNamespace(image_grid_pinpoints=pinpoints), **fields
    )
    one._get_unpadded_features = types.MethodType(cls._get_unpadded_features, one)
    return one


@EXAMPLES
@given(SIDES, SIDES)
def test_anyres_of_llava_next(height: int, width: int) -> None:
    if is_extreme(height, width):
        return
    one = anyres_self(
        LlavaNextProcessor, NEXT_PINPOINTS, patch_size=14, num_additional_image_tokens=0
    )
    expected = LlavaNextProcessor._get_number_of_features(one, height, width, 336, 336)
    sizing = AnyresSizing(336, 24, tuple((h, w) for h, w in NEXT_PINPOINTS))
    layout = sizing.measure(height, width)
    best = select_best_resolution((height, width), NEXT_PINPOINTS)
    assert layout.num_tokens == expected
    assert layout.grid_thw == (1, best[0] // 336, best[1] // 336)


@EXAMPLES
@given(SIDES, SIDES)
def test_anyres_of_llava_onevision(height: int, width: int) -> None:
    if is_extreme(height, width):
        return
    pinpoints = LlavaOnevisionImageProcessorPil.image_grid_pinpoints
    one = anyres_self(
        LlavaOnevisionProcessor,
        pinpoints,
        num_image_tokens=729,
        vision_aspect_ratio="anyres_max_9",
    )
    expected = LlavaOnevisionProcessor._get_number_of_features(one, height, width, 384, 384)
    sizing = AnyresSizing(384, 27, tuple((h, w) for h, w in pinpoints), max_tiles=9)
    assert sizing.measure(height, width).num_tokens == expected


@pytest.mark.parametrize(
    "sizing",
    [
        FixedSizing(576),
        CanvasSizing(448, 256, 1, 12, "<img>", "</img>"),
        SplitSizing(512, 64, 2048, splits=True),
        AnyresSizing(336, 24, ((336, 672),)),
    ],
)
@pytest.mark.parametrize("size", [(1, 201), (4020, 20)])
def test_extreme_pictures_are_refused(sizing: ImageSizing, size: tuple[int, int]) -> None:
    with pytest.raises(RequestFailed, match="aspect ratio of 201, the limit is 200"):
        sizing.measure(*size)
