"""The files that describe pictures, and their fields.

In: a model folder. Out: parsed JSON, and `UnsupportedModel` where two files contradict each other.
Processors may be saved as preprocessor_config.json or inside processor_config.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import UnsupportedModel
from shared.model.config_fields import Config, parse_config, read_optional_bytes, required

_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
)

# What transformers' vision configs say where config.json is silent: pixels a side, and a patch's.
_DEFAULT_SIDES = {
    "clip_vision_model": (224, 32),
    "siglip_vision_model": (224, 16),
    "internvl_vision": (448, 14),
    "idefics3_vision": (224, 32),
    "smolvlm_vision": (224, 32),
}


@dataclass(frozen=True)
class VisionFiles:
    """config.json, its vision part, the settings of image processor, processor, tokenizer and video
    processor."""

    config: Config
    vision: Config
    image_processor: Config
    processor: Config
    tokenizer: Config
    video_processor: Config

    @classmethod
    def read(cls, model_dir: Path, config: Config) -> VisionFiles:
        """Missing files are empty."""
        image_processor, processor, tokenizer, video = (
            parse_config(read_optional_bytes(model_dir / name), model_dir / name) for name in _FILES
        )
        nested = processor.get("image_processor")
        if not image_processor and isinstance(nested, dict):
            image_processor = nested
        # In the order in which transformers looks for it.
        video = processor.get("video_processor") or video or image_processor
        vision: Config = required(config, "vision_config")
        return cls(config, vision, image_processor, processor, tokenizer, video)

    @property
    def model_type(self) -> str:
        """The vision tower's own."""
        return str(self.vision.get("model_type"))

    def tower_side(self, expected_types: tuple[str, ...]) -> tuple[int, int]:
        """Pixels a side of the tower's pictures, and of its patches; the tower must be known."""
        if self.model_type not in expected_types:
            raise UnsupportedModel(
                f"vision_config.model_type={self.model_type!r} is not supported here; "
                f"supported: {', '.join(expected_types)}"
            )
        image, patch = _DEFAULT_SIDES[self.model_type]
        return (
            _square("vision_config.image_size", self.vision.get("image_size", image)),
            _square("vision_config.patch_size", self.vision.get("patch_size", patch)),
        )

    def processor_side(self, default: int) -> int:
        """Pixels a side of the pictures that the image processor makes."""
        for field in ("crop_size", "size"):
            sizes = self.image_processor.get(field)
            if field == "crop_size" and self.image_processor.get("do_center_crop") is False:
                continue
            if isinstance(sizes, int):
                return sizes
            if isinstance(sizes, dict) and sizes:
                if "height" in sizes:
                    return _square(f"preprocessor {field}", [sizes["height"], sizes["width"]])
                return int(required(sizes, "shortest_edge"))
        return default

    def text_of(self, names: tuple[str, ...], default: str) -> str:
        """A special token's text, under the first of `names` that the tokenizer's settings have."""
        extra = self.tokenizer.get("extra_special_tokens")
        for source in (extra if isinstance(extra, dict) else {}, self.tokenizer):
            for name in names:
                value = source.get(name)
                value = value.get("content") if isinstance(value, dict) else value
                if isinstance(value, str) and value:
                    return value
        return default

    def check_num_tokens(self, field: str, num_tokens: int) -> None:
        """The processor's placeholders for a tile, if it counts them, must be the tower's rows."""
        value = self.processor.get(field)
        if value is not None and value != num_tokens:
            raise UnsupportedModel(
                f"processor_config.json: {field}={value!r}, the vision tower gives {num_tokens}"
            )


def preprocessor_bytes(model_dir: Path) -> bytes:
    """What decides how pictures are prepared, as it stands in the folder; empty if nothing does."""
    raw = read_optional_bytes(model_dir / "preprocessor_config.json")
    return raw or read_optional_bytes(model_dir / "processor_config.json")


def check_equal(what: str, value: Any, expected: Any) -> None:
    """Two files that describe the same thing must agree."""
    if value != expected:
        raise UnsupportedModel(f"{what}={value!r} is not supported; supported: {expected!r}")


def _square(field: str, value: Any) -> int:
    """A side, given as a number or as two equal ones."""
    sides = value if isinstance(value, (list, tuple)) else (value, value)
    if len(sides) != 2 or sides[0] != sides[1]:
        raise UnsupportedModel(f"{field}={value!r} is not supported; supported: squares")
    return int(sides[0])
