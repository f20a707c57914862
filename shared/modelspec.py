"""What a model folder says about itself, read once and checked.

In: a folder with config.json and, where present, generation_config.json, preprocessor_config.json
and *.safetensors (only their names and sizes are looked at). Out: a frozen `ModelSpec`. This module
imports neither torch nor transformers, so every process of the system can use it. It refuses what
the engine cannot do exactly instead of guessing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from shared.errors import UnsupportedModel
from shared.model.config_fields import (
    Config,
    parse_config,
    read_bytes,
    read_optional_bytes,
    required,
)
from shared.model.registry import Family, family_of, language_family
from shared.model.text_spec import MoeSpec, TextSpec, text_config

__all__ = ["ModelSpec", "MoeSpec", "TextSpec", "VisionSpec"]

# float64 is not for serving: it is the oracle in which packing and chunking are compared.
SUPPORTED_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, slots=True)
class VisionSpec:
    """Shape of the vision tower's inputs and outputs, and the token ids that stand for media."""

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    in_channels: int
    out_hidden_size: int
    tokens_per_second: float | None
    image_token_id: int
    video_token_id: int | None
    vision_start_token_id: int | None
    vision_end_token_id: int | None
    min_pixels: int | None
    max_pixels: int | None

    @property
    def patch_dim(self) -> int:
        """Values in one flattened patch, the width of `pixel_values`."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    def num_tokens(self, grid_thw: tuple[int, int, int]) -> int:
        """Placeholder tokens, equal to embedding rows, of one picture or clip of this grid."""
        t, h, w = grid_thw
        return t * (h // self.merge_size) * (w // self.merge_size)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Everything a process must know about a model before it loads a single weight.

    `fingerprint` is a SHA-256 over config.json and the names and sizes of the weight files: two
    workers with different fingerprints must not exchange embeddings or KV blocks.
    `preprocessor_hash` is part of what an embedding depends on; empty without a preprocessor.
    """

    model_type: str
    dtype: str
    text: TextSpec
    vision: VisionSpec | None
    eos_token_ids: tuple[int, ...]
    fingerprint: str
    preprocessor_hash: str

    @property
    def family(self) -> Family:
        return family_of(self.model_type)

    @property
    def embedding_width(self) -> int:
        """Values of one embedding row, between encode and prefill."""
        return self.text.embedding_width

    @property
    def roles(self) -> tuple[str, ...]:
        """Stages that this model can be split into."""
        return ("encode", "prefill", "decode") if self.vision else ("prefill", "decode")

    @classmethod
    def load(cls, model_dir: Path) -> ModelSpec:
        """Read and check a model folder; `UnsupportedModel` says which field stands in the way."""
        config_bytes = read_bytes(model_dir / "config.json")
        config = parse_config(config_bytes, model_dir / "config.json")
        generation_path = model_dir / "generation_config.json"
        generation = parse_config(read_optional_bytes(generation_path), generation_path)
        preprocessor_path = model_dir / "preprocessor_config.json"
        preprocessor_bytes = read_optional_bytes(preprocessor_path)
        preprocessor = parse_config(preprocessor_bytes, preprocessor_path)
        family = family_of(config.get("model_type"))
        _refuse_quantization(config)
        text = text_config(config)
        return cls(
            model_type=family.model_type,
            dtype=_dtype(config, text),
            text=TextSpec.of(config, language_family(config)),
            vision=_vision_spec(config, family, preprocessor),
            eos_token_ids=_eos_token_ids(generation, text, config),
            fingerprint=_fingerprint(model_dir, config_bytes),
            preprocessor_hash=hashlib.sha256(preprocessor_bytes).hexdigest()
            if preprocessor_bytes
            else "",
        )


def _refuse_quantization(config: Config) -> None:
    method = config.get("quantization_config")
    if method is not None:
        name = method.get("quant_method") if isinstance(method, dict) else method
        raise UnsupportedModel(
            f"quantization_config.quant_method={name!r} is not supported; supported: none"
        )


def _dtype(config: Config, text: Config) -> str:
    for source in (config, text):
        for field in ("dtype", "torch_dtype"):
            value = source.get(field)
            if value in SUPPORTED_DTYPES:
                return str(value)
            if value is not None:
                raise UnsupportedModel(
                    f"{field}={value!r} is not supported; supported: {', '.join(SUPPORTED_DTYPES)}"
                )
    return "float32"


def _vision_spec(config: Config, family: Family, preprocessor: Config) -> VisionSpec | None:
    if family.tower is None:
        return None
    vision: Config = required(config, "vision_config")
    size: Config = preprocessor.get("size") or {}
    tokens_per_second = vision.get("tokens_per_second")
    return VisionSpec(
        patch_size=int(vision.get("patch_size", 14)),
        merge_size=int(vision.get("spatial_merge_size", 2)),
        temporal_patch_size=int(vision.get("temporal_patch_size", 2)),
        in_channels=int(vision.get("in_channels", vision.get("in_chans", 3))),
        out_hidden_size=int(required(vision, family.tower.out_hidden_field)),
        tokens_per_second=None if tokens_per_second is None else float(tokens_per_second),
        image_token_id=int(required(config, "image_token_id")),
        video_token_id=config.get("video_token_id"),
        vision_start_token_id=config.get("vision_start_token_id"),
        vision_end_token_id=config.get("vision_end_token_id"),
        min_pixels=preprocessor.get("min_pixels") or size.get("shortest_edge"),
        max_pixels=preprocessor.get("max_pixels") or size.get("longest_edge"),
    )


def _eos_token_ids(*sources: Config) -> tuple[int, ...]:
    """The first source that names end tokens wins: generation settings before the architecture."""
    for source in sources:
        value = source.get("eos_token_id")
        if value is not None:
            return tuple(value) if isinstance(value, list) else (int(value),)
    return ()


def _fingerprint(model_dir: Path, config_bytes: bytes) -> str:
    digest = hashlib.sha256(config_bytes)
    for path in sorted(model_dir.glob("*.safetensors")):
        digest.update(f"\n{path.name} {path.stat().st_size}".encode())
    return digest.hexdigest()
