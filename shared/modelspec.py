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
    expect,
    parse_config,
    read_bytes,
    read_optional_bytes,
    required,
)
from shared.model.registry import Family, family_of
from shared.model.rope_spec import RopeSpec
from shared.model.vision.fields import preprocessor_bytes
from shared.model.vision.spec import VisionSpec as VisionSpec

# float64 is not for serving: it is the oracle in which packing and chunking are compared.
SUPPORTED_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, slots=True)
class TextSpec:
    """Shape of the language model."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope: RopeSpec
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    max_context_tokens: int


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
        family = family_of(config.get("model_type"))
        _refuse_quantization(config)
        text = _text_config(config)
        text_spec = _text_spec(config, text, family)
        return cls(
            model_type=family.model_type,
            dtype=_dtype(config, text),
            text=text_spec,
            vision=VisionSpec.load(model_dir, config, family.tower, text_spec.hidden_size)
            if family.tower
            else None,
            eos_token_ids=_eos_token_ids(generation, text, config),
            fingerprint=_fingerprint(model_dir, config_bytes),
            preprocessor_hash=_preprocessor_hash(model_dir),
        )


def _text_config(config: Config) -> Config:
    """The language model's fields, nested (transformers) or at the top level (hub)."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


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


def _text_spec(config: Config, text: Config, family: Family) -> TextSpec:
    expect(text, "hidden_act", "silu")
    expect(text, "mlp_bias", False)
    _refuse_sliding_window(text)
    num_heads = int(required(text, "num_attention_heads"))
    hidden_size = int(required(text, "hidden_size"))
    attention_bias = bool(text.get("attention_bias", False))
    tied = config.get("tie_word_embeddings") or text.get("tie_word_embeddings")
    return TextSpec(
        hidden_size=hidden_size,
        num_layers=int(required(text, "num_hidden_layers")),
        num_heads=num_heads,
        num_kv_heads=int(text.get("num_key_value_heads") or num_heads),
        head_dim=int(text.get("head_dim") or family.default_head_dim or hidden_size // num_heads),
        intermediate_size=int(required(text, "intermediate_size")),
        vocab_size=int(required(text, "vocab_size")),
        rms_norm_eps=float(required(text, "rms_norm_eps")),
        rope=RopeSpec.of(text, family),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        o_bias=attention_bias if family.qkv_bias is None else False,
        qk_norm=family.qk_norm,
        tie_word_embeddings=bool(tied),
        max_context_tokens=int(required(text, "max_position_embeddings")),
    )


def _refuse_sliding_window(text: Config) -> None:
    layer_types = text.get("layer_types") or ()
    other = sorted(set(layer_types) - {"full_attention"})
    if other:
        raise UnsupportedModel(f"layer_types has {other}; supported: ['full_attention']")
    if not text.get("use_sliding_window") or text.get("sliding_window") is None or layer_types:
        return
    num_layers = int(required(text, "num_hidden_layers"))
    first_sliding = int(text.get("max_window_layers") or 0)
    if first_sliding < num_layers:
        raise UnsupportedModel(
            f"use_sliding_window=True from layer {first_sliding} of {num_layers} is not supported; "
            "supported: full attention in every layer"
        )


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
