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
from shared.media.kind import MediaKind
from shared.model.audio_spec import AudioSpec
from shared.model.config_fields import (
    Config,
    parse_config,
    read_bytes,
    read_optional_bytes,
)
from shared.model.registry import Family, family_of, language_family
from shared.model.text_spec import MoeSpec, TextSpec, text_config
from shared.model.vision.fields import preprocessor_bytes
from shared.model.vision.spec import VisionSpec

__all__ = ["AudioSpec", "ModelSpec", "MoeSpec", "TextSpec", "VisionSpec"]

# float64 is not for serving: it is the oracle in which packing and chunking are compared.
SUPPORTED_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Everything a process must know about a model before it loads a single weight.

    `fingerprint` is a SHA-256 over config.json and the names and sizes of the weight files: two
    workers with different fingerprints must not exchange embeddings or KV blocks.
    `preprocessor_hash` is part of what an embedding depends on; empty without a preprocessor.
    A model has `vision`, `audio` or neither.
    """

    model_type: str
    dtype: str
    text: TextSpec
    vision: VisionSpec | None
    eos_token_ids: tuple[int, ...]
    fingerprint: str
    preprocessor_hash: str
    audio: AudioSpec | None = None

    @property
    def family(self) -> Family:
        return family_of(self.model_type)

    @property
    def embedding_width(self) -> int:
        """Values of one embedding row, between encode and prefill."""
        return self.text.embedding_width

    @property
    def has_tower(self) -> bool:
        """Whether there is something to encode with."""
        return self.vision is not None or self.audio is not None

    @property
    def media_kinds(self) -> frozenset[MediaKind]:
        """What this model reads besides text."""
        kinds = {
            MediaKind.IMAGE: self.vision is not None,
            MediaKind.VIDEO: self.vision is not None and self.vision.clips is not None,
            MediaKind.AUDIO: self.audio is not None,
        }
        return frozenset(kind for kind, is_read in kinds.items() if is_read)

    @property
    def roles(self) -> tuple[str, ...]:
        """Stages that this model can be split into."""
        return ("encode", "prefill", "decode") if self.has_tower else ("prefill", "decode")

    @classmethod
    def load(cls, model_dir: Path) -> ModelSpec:
        """Read and check a model folder; `UnsupportedModel` says which field stands in the way."""
        config_bytes = read_bytes(model_dir / "config.json")
        config = parse_config(config_bytes, model_dir / "config.json")
        generation_path = model_dir / "generation_config.json"
        generation = parse_config(read_optional_bytes(generation_path), generation_path)
        family = family_of(config.get("model_type"))
        _refuse_quantization(config)
        text = text_config(config)
        text_spec = TextSpec.of(config, language_family(config))
        tower = family.tower
        hears = tower is not None and tower.kind == "audio"
        return cls(
            model_type=family.model_type,
            dtype=_dtype(config, text),
            text=text_spec,
            vision=VisionSpec.load(model_dir, config, tower, text_spec.hidden_size)
            if tower and not hears
            else None,
            audio=AudioSpec.load(model_dir, config) if hears else None,
            eos_token_ids=_eos_token_ids(generation, text, config),
            fingerprint=_fingerprint(model_dir, config_bytes),
            preprocessor_hash=_preprocessor_hash(model_dir),
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


def _preprocessor_hash(model_dir: Path) -> str:
    raw = preprocessor_bytes(model_dir)
    return hashlib.sha256(raw).hexdigest() if raw else ""


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
