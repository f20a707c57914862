"""A model folder whose pictures are tiles, for benches that divide them over encoders.

The demo model's words and sizes with InternVL's vision side, and no weights. A bench's picture of
`PICTURE_PIXELS` a side becomes 3 by 3 tiles and the whole picture in one more: what MiniCPM-V makes
of the photograph that it stands for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.delayed.cluster import write_model

TILE_PIXELS, PATCH_PIXELS = 56, 14
NUM_TILES = 10
TILE_PATCHES = (TILE_PIXELS // PATCH_PIXELS) ** 2
TILE_TOKENS = TILE_PATCHES // 4
"""Neighbours two by two become one row."""

_HEIGHT_AND_WIDTH = {"height": TILE_PIXELS, "width": TILE_PIXELS}


def write_tile_model(folder: Path) -> Path:
    """The demo model's folder with another config and another image processor."""
    write_model(folder)
    _rewrite(folder / "config.json", _as_internvl)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "GotOcr2ImageProcessorFast",
                "size": _HEIGHT_AND_WIDTH,
                "crop_to_patches": True,
                "max_patches": NUM_TILES - 1,
            }
        ),
        encoding="utf-8",
    )
    return folder


def _as_internvl(config: dict[str, Any]) -> dict[str, Any]:
    text = {name: value for name, value in config["text_config"].items() if value is not None}
    text |= {"model_type": "qwen2", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    vision = config["vision_config"]
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "dtype": config["dtype"],
        "image_token_id": config["image_token_id"],
        "text_config": text,
        "tie_word_embeddings": config["tie_word_embeddings"],
        "downsample_ratio": 0.5,
        "vision_feature_select_strategy": "default",
        "vision_config": {
            "model_type": "internvl_vision",
            "image_size": [TILE_PIXELS, TILE_PIXELS],
            "patch_size": [PATCH_PIXELS, PATCH_PIXELS],
            "hidden_size": vision["hidden_size"],
            "intermediate_size": vision["intermediate_size"],
            "num_attention_heads": vision["num_heads"],
            "num_hidden_layers": vision["depth"],
        },
    }


def _rewrite(path: Path, change: Any) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(change(config)), encoding="utf-8")
