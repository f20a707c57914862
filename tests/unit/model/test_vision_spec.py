"""The vision side of model folders: well-known settings, and clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shared.errors import UnsupportedModel
from shared.media.sizing.anyres import AnyresSizing
from shared.media.sizing.canvas import CanvasSizing
from shared.media.sizing.fixed import FixedSizing
from shared.media.sizing.grid import GridSizing
from shared.media.sizing.split import SplitSizing
from shared.model.registry import family_of
from shared.model.vision.spec import VisionSpec

CLIP = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14}
SIGLIP = {"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14}
# The fields that matter, as the hub's folders have them: config, image processor, processor.
FOLDERS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "llava": (
        {"image_token_index": 32000, "vision_config": CLIP, "vision_feature_layer": -2},
        {"crop_size": {"height": 336, "width": 336}, "size": {"shortest_edge": 336}},
        {"patch_size": 14, "num_additional_image_tokens": 1},
    ),
    "llava_next": (
        {
            "image_token_index": 32000,
            "vision_config": CLIP,
            "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672]],
        },
        {"crop_size": {"height": 336, "width": 336}, "size": {"shortest_edge": 336}},
        {},
    ),
    "llava_onevision": (
        {
            "image_token_index": 151646,
            "video_token_index": 151647,
            "vision_config": SIGLIP,
            "image_grid_pinpoints": [[384, 384], [384, 768]],
            "vision_aspect_ratio": "anyres_max_9",
        },
        {"size": {"height": 384, "width": 384}},
        {"num_image_tokens": 729},
    ),
    "gemma3": (
        {
            "image_token_index": 262144,
            "boi_token_index": 255999,
            "mm_tokens_per_image": 256,
            "vision_config": {**SIGLIP, "image_size": 896},
        },
        {"size": {"height": 896, "width": 896}},
        {"image_seq_length": 256},
    ),
    "internvl": (
        {
            "image_token_id": 151667,
            "downsample_ratio": 0.5,
            "vision_config": {
                "model_type": "internvl_vision",
                "image_size": [448, 448],
                "patch_size": [14, 14],
            },
        },
        {"size": {"height": 448, "width": 448}, "min_patches": 1, "max_patches": 12},
        {"image_seq_length": 256},
    ),
    "smolvlm": (
        {
            "image_token_id": 49190,
            "scale_factor": 4,
            "vision_config": {"model_type": "smolvlm_vision", "image_size": 512, "patch_size": 16},
        },
        {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}},
        {"image_seq_len": 64},
    ),
    "qwen3_vl": (
        {
            "image_token_id": 151655,
            "vision_config": {
                "patch_size": 16,
                "out_hidden_size": 2048,
                "deepstack_visual_indexes": [5, 11, 17],
            },
        },
        {"size": {"longest_edge": 16777216, "shortest_edge": 65536}, "patch_size": 16},
        {},
    ),
}


def load(folder: Path, name: str, **changes: Any) -> VisionSpec:
    config, image_processor, processor = FOLDERS[name]
    files = {
        "preprocessor_config.json": {**image_processor, **changes.pop("image_processor", {})},
        "processor_config.json": {**processor, **changes.pop("processor", {})},
        "tokenizer_config.json": changes.pop("tokenizer", {}),
    }
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content))
    tower = family_of(name).tower
    assert tower is not None
    return VisionSpec.load(folder, {"model_type": name, **config, **changes}, tower, 2048)


def test_well_known_folders(tmp_path: Path) -> None:
    pinpoints = ((336, 672), (672, 336), (672, 672))
    expected = {
        "llava": FixedSizing(576),
        "llava_next": AnyresSizing(336, 24, pinpoints),
        "llava_onevision": AnyresSizing(384, 27, ((384, 384), (384, 768)), max_tiles=9),
        "gemma3": FixedSizing(256, "\n\n<start_of_image>", "<end_of_image>\n\n"),
        "internvl": CanvasSizing(448, 256, 1, 12, "<img>", "</img>", 1024),
        "smolvlm": SplitSizing(512, 64, 2048, splits=True, patches_per_tile=1024),
        "qwen3_vl": GridSizing(16, 2, 65536, 16777216),
    }
    specs = {name: load(tmp_path, name) for name in expected}
    assert {name: spec.sizing for name, spec in specs.items()} == expected
    assert specs["qwen3_vl"].num_deepstack_layers == 3
    assert {spec.out_hidden_size for spec in specs.values()} == {2048}
    assert specs["gemma3"].template_token_id == 255999
    assert specs["llava_onevision"].image_token_id == 151646


def test_marks_come_from_the_tokenizer(tmp_path: Path) -> None:
    nested = {"extra_special_tokens": {"start_image_token": "<begin>"}, "end_image_token": "<stop>"}
    sizing = load(tmp_path, "internvl", tokenizer=nested).sizing
    assert isinstance(sizing, CanvasSizing)
    assert (sizing.before, sizing.after) == ("<begin>", "<stop>")


def test_an_image_processor_inside_the_processor(tmp_path: Path) -> None:
    load(tmp_path, "smolvlm")
    (tmp_path / "preprocessor_config.json").unlink()
    nested = {"max_image_size": {"longest_edge": 384}, "size": {"longest_edge": 1536}}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": nested}))
    tower = family_of("smolvlm").tower
    assert tower is not None
    spec = VisionSpec.load(tmp_path, FOLDERS["smolvlm"][0], tower, 2048)
    assert spec.sizing == SplitSizing(384, 36, 1536, splits=True, patches_per_tile=576)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llava", {"vision_config": {"model_type": "pixtral"}}, "vision_config.model_type='pixtra"),
        ("llava", {"image_processor": {"crop_size": {"height": 224, "width": 224}}}, "side=224"),
        ("llava", {"image_processor": {"do_resize": False}}, "do_resize=False"),
        ("llava", {"vision_feature_select_strategy": "cls"}, "strategy='cls'"),
        ("llava", {"image_token_index": None}, "no image_token_index"),
        ("llava_next", {"vision_feature_select_strategy": "full"}, "'full' with clip_vision_model"),
        ("llava_next", {"image_grid_pinpoints": [[336, 336]]}, "image_grid_pinpoints"),
        ("llava_next", {"image_grid_pinpoints": [[336, 500]]}, "image_grid_pinpoints"),
        ("llava_onevision", {"vision_aspect_ratio": "square"}, "vision_aspect_ratio='square'"),
        ("gemma3", {"mm_tokens_per_image": 250}, "mm_tokens_per_image=250 cannot be pooled"),
        ("gemma3", {"processor": {"image_seq_length": 64}}, "image_seq_length=64, the vision towe"),
        ("internvl", {"downsample_ratio": 0.3}, "downsample_ratio=0.3"),
        ("internvl", {"image_processor": {"max_patches": 65}}, "max_patches=65.* 1 to 64"),
        ("internvl", {"vision_feature_select_strategy": "full"}, "strategy='full'"),
        ("smolvlm", {"scale_factor": 5}, "longest_edge=512 is no multiple of 16x5"),
        ("smolvlm", {"processor": {"image_seq_len": 169}}, "image_seq_len=169"),
        ("smolvlm", {"image_processor": {"size": {"height": 512, "width": 512}}}, "longest_edge"),
    ],
)
def test_refusals(tmp_path: Path, name: str, changes: dict[str, Any], message: str) -> None:
    if changes.get("image_grid_pinpoints") == [[336, 336]]:
        changes = {**changes, "image_processor": {"image_grid_pinpoints": [[336, 672]]}}
    with pytest.raises(UnsupportedModel, match=message):
        load(tmp_path, name, **changes)
