"""From the settings of towers with one picture size to their sizing rules.

In: the folder's files. Out: the patch size and the rule; `UnsupportedModel` where tower, processor
and prompt could not agree for every picture.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from shared.errors import UnsupportedModel
from shared.media.sizing.anyres import AnyresSizing
from shared.media.sizing.base import ImageSizing
from shared.media.sizing.canvas import CanvasSizing
from shared.media.sizing.fixed import FixedSizing
from shared.media.sizing.split import SplitSizing
from shared.model.config_fields import expect, required
from shared.model.tower_families import TowerKind
from shared.model.vision.fields import VisionFiles, check_equal

# Every picture is compared with every shape of so many tiles.
_MAX_TILES = 64
_LLAVA_TOWERS = ("clip_vision_model", "siglip_vision_model")


def tile_sizing(files: VisionFiles, kind: TowerKind) -> tuple[int, ImageSizing]:
    """Pixels a side of a patch, and the rule."""
    expect(files.image_processor, "do_resize", True)
    return _SIZINGS[kind](files)


def _llava(files: VisionFiles) -> tuple[int, ImageSizing]:
    side, patch = files.tower_side(_LLAVA_TOWERS)
    check_equal("the image processor's picture side", files.processor_side(side), side)
    return patch, FixedSizing(num_tokens=(side // patch) ** 2 + _num_extra_features(files))


def _anyres(files: VisionFiles) -> tuple[int, ImageSizing]:
    side, patch = files.tower_side(_LLAVA_TOWERS)
    check_equal("the image processor's picture side", files.processor_side(side), side)
    if _num_extra_features(files):
        strategy = files.config.get("vision_feature_select_strategy")
        raise UnsupportedModel(
            f"vision_feature_select_strategy={strategy!r} with {files.model_type} does not leave "
            "one feature for each patch, which tiles need"
        )
    resolutions = required(files.config, "image_grid_pinpoints")
    listed = files.image_processor.get("image_grid_pinpoints")
    if listed is not None:
        check_equal("the image processor's image_grid_pinpoints", listed, resolutions)
    return patch, AnyresSizing(
        tile_size=side,
        side=side // patch,
        resolutions=_resolutions(resolutions, side),
        max_tiles=_max_tiles(files),
    )


def _resolutions(pinpoints: Any, side: int) -> tuple[tuple[int, int], ...]:
    """Heights and widths, each a whole number of tiles."""
    good = isinstance(pinpoints, list) and all(
        isinstance(each, list)
        and len(each) == 2
        and all(isinstance(length, int) and length > 0 and length % side == 0 for length in each)
        for each in pinpoints
    )
    if not good or not pinpoints:
        raise UnsupportedModel(
            f"image_grid_pinpoints={pinpoints!r} is not supported; "
            f"supported: pairs of multiples of {side} pixels"
        )
    return tuple((height, width) for height, width in pinpoints)


def _max_tiles(files: VisionFiles) -> int | None:
    """Only LLaVA-OneVision shrinks features."""
    if files.config.get("model_type") != "llava_onevision":
        return None
    policy = str(files.config.get("vision_aspect_ratio", "anyres_max_9"))
    match = re.fullmatch(r"anyres_max_(\d+)", policy)
    if match is None:
        raise UnsupportedModel(
            f"vision_aspect_ratio={policy!r} is not supported; supported: 'anyres_max_N'"
        )
    return int(match.group(1))


def _num_extra_features(files: VisionFiles) -> int:
    """Features of a tile beyond one for each patch: CLIP adds a class feature in front, and the
    `default` strategy drops the first feature, whatever it is."""
    is_onevision = files.config.get("model_type") == "llava_onevision"
    strategy = files.config.get(
        "vision_feature_select_strategy", "full" if is_onevision else "default"
    )
    if strategy not in ("default", "full"):
        raise UnsupportedModel(
            f"vision_feature_select_strategy={strategy!r} is not supported; "
            "supported: 'default', 'full'"
        )
    return int(files.model_type == "clip_vision_model") - int(strategy == "default")


def _gemma3(files: VisionFiles) -> tuple[int, ImageSizing]:
    side, patch = files.tower_side(("siglip_vision_model",))
    check_equal("the image processor's picture side", files.processor_side(224), side)
    num_tokens = int(files.config.get("mm_tokens_per_image") or 256)
    pooled = side // patch // max(int(num_tokens**0.5), 1)
    if pooled < 1 or (side // patch // pooled) ** 2 != num_tokens:
        raise UnsupportedModel(
            f"mm_tokens_per_image={num_tokens} cannot be pooled from {side // patch} by "
            f"{side // patch} patches"
        )
    files.check_num_tokens("image_seq_length", num_tokens)
    start = files.text_of(("boi_token",), "<start_of_image>")
    end = files.text_of(("eoi_token",), "<end_of_image>")
    return patch, FixedSizing(num_tokens, before=f"\n\n{start}", after=f"{end}\n\n")


def _internvl(files: VisionFiles) -> tuple[int, ImageSizing]:
    side, patch = files.tower_side(("internvl_vision",))
    check_equal("the image processor's picture side", files.processor_side(384), side)
    expect(files.config, "vision_feature_select_strategy", "default")
    kept = side // patch * float(files.config.get("downsample_ratio", 0.5))
    if kept != int(kept):
        raise UnsupportedModel(
            f"downsample_ratio={files.config.get('downsample_ratio')} does not divide "
            f"{side // patch} by {side // patch} patches"
        )
    files.check_num_tokens("image_seq_length", int(kept) ** 2)
    low = int(files.image_processor.get("min_patches") or 1)
    high = int(files.image_processor.get("max_patches") or 12)
    if not 1 <= low <= high <= _MAX_TILES:
        raise UnsupportedModel(
            f"min_patches={low}, max_patches={high} is not supported; supported: 1 to {_MAX_TILES}"
        )
    return patch, CanvasSizing(
        tile_size=side,
        tokens_per_tile=int(kept) ** 2,
        min_tiles=low,
        max_tiles=high,
        before=files.text_of(("start_image_token",), "<img>"),
        after=files.text_of(("end_image_token",), "</img>"),
        patches_per_tile=(side // patch) ** 2,
    )


def _idefics3(files: VisionFiles) -> tuple[int, ImageSizing]:
    _, patch = files.tower_side(("idefics3_vision", "smolvlm_vision"))
    settings: Mapping[str, Any] = files.image_processor
    tile = int((settings.get("max_image_size") or {}).get("longest_edge", 364))
    merge = int(files.config.get("scale_factor") or 2)
    if tile % (patch * merge):
        raise UnsupportedModel(
            f"max_image_size.longest_edge={tile} is no multiple of {patch}x{merge} pixels"
        )
    tokens_per_tile = (tile // patch // merge) ** 2
    files.check_num_tokens("image_seq_len", tokens_per_tile)
    return patch, SplitSizing(
        tile_size=tile,
        tokens_per_tile=tokens_per_tile,
        longest_edge=int(required(settings.get("size") or {"longest_edge": 1456}, "longest_edge")),
        splits=settings.get("do_image_splitting") is not False,
        around=files.text_of(("fake_image_token",), "<fake_token_around_image>"),
        whole=files.text_of(("global_image_token",), "<global-img>"),
        patches_per_tile=(tile // patch) ** 2,
    )


_SIZINGS: Mapping[str, Callable[[VisionFiles], tuple[int, ImageSizing]]] = {
    "llava": _llava,
    "anyres": _anyres,
    "gemma3": _gemma3,
    "internvl": _internvl,
    "idefics3": _idefics3,
}
