"""The rotary embedding that a config asks for.

In: the language part of a config, in either of its two spellings. Out: a `RopeSpec`.
Knows no torch; `rope.py` turns the spec into angles.

Sources: Peng et al. 2023 (YaRN, section 3.4, the attention scale); Wang et al. 2024 (Qwen2-VL,
section 2.1, sections of channels).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from shared.errors import UnsupportedModel
from shared.model.config_fields import Config, expect, required
from shared.model.registry import Family

SUPPORTED_ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding of the language model. Factors are 1.0 where the type has none.

    `mrope_section`: pairs of channels that follow the temporal, height and width position;
    None for plain one-dimensional positions. They lie in three blocks, or take turns where
    `mrope_interleaved`. `attention_scaling` multiplies cosine and sine.
    """

    rope_type: str
    theta: float
    mrope_section: tuple[int, int, int] | None = None
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_tokens: int = 0
    mrope_interleaved: bool = False
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_scaling: float = 1.0

    @classmethod
    def of(cls, text: Config, family: Family) -> RopeSpec:
        """The rotation of layers with full attention."""
        rope = _parameters(text, family, "full_attention")
        theta = rope.get("rope_theta") or text.get("rope_theta") or family.default_rope_theta
        return cls._read(text, rope, family, float(theta))

    @classmethod
    def of_sliding_layers(cls, text: Config, family: Family) -> RopeSpec:
        """The rotation of sliding layers, the same as of the others in most families."""
        if family.default_local_rope_theta is None:
            return cls.of(text, family)
        rope = _parameters(text, family, "sliding_attention")
        theta = rope.get("rope_theta") or text.get("rope_local_base_freq")
        return cls._read(text, rope, family, float(theta or family.default_local_rope_theta))

    @classmethod
    def _read(cls, text: Config, rope: Config, family: Family, theta: float) -> RopeSpec:
        expect(rope, "partial_rotary_factor", 1.0)
        expect(text, "partial_rotary_factor", 1.0)
        rope_type = _rope_type(rope, family)
        original = int(
            text.get("original_max_position_embeddings")
            or rope.get("original_max_position_embeddings")
            or required(text, "max_position_embeddings")
        )
        factor = _factor(text, rope, rope_type, original)
        return cls(
            rope_type=rope_type,
            theta=theta,
            mrope_section=_mrope_section(rope, family) if family.mrope else None,
            factor=factor,
            low_freq_factor=float(rope.get("low_freq_factor") or 1.0),
            high_freq_factor=float(rope.get("high_freq_factor") or 1.0),
            original_max_tokens=original,
            mrope_interleaved=family.mrope_interleaved,
            beta_fast=float(rope.get("beta_fast") or 32.0),
            beta_slow=float(rope.get("beta_slow") or 1.0),
            truncate=bool(rope.get("truncate", True)),
            attention_scaling=_yarn_scaling(rope, factor) if rope_type == "yarn" else 1.0,
        )


def _parameters(text: Config, family: Family, layer_type: str) -> Config:
    """`rope_parameters`, or the older `rope_scaling`; for one layer type where they are nested."""
    rope: Config = text.get("rope_scaling") or text.get("rope_parameters") or {}
    nested = _LAYER_TYPES & rope.keys()
    if nested and family.default_local_rope_theta is None:
        raise UnsupportedModel(
            f"rope_parameters has {sorted(nested)}; supported for {family.model_type}: "
            "one rotation for all layers"
        )
    if nested:
        part = rope.get(layer_type) or {}
        return part if isinstance(part, Mapping) else {}
    # The older spelling scales the layers with full attention only.
    return rope if layer_type == "full_attention" else {}


def _rope_type(rope: Config, family: Family) -> str:
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    # "mrope" is the old name of default frequencies on three axes.
    if family.mrope and rope_type == "mrope":
        return "default"
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise UnsupportedModel(
            f"rope_type={rope_type!r} is not supported; supported: {SUPPORTED_ROPE_TYPES}"
        )
    return str(rope_type)


def _factor(text: Config, rope: Config, rope_type: str, original: int) -> float:
    factor = rope.get("factor")
    if factor is None and rope_type == "yarn":
        return float(required(text, "max_position_embeddings")) / original
    if factor is None and rope_type != "default":
        raise UnsupportedModel(f"rope_type={rope_type!r} needs a factor, and the config has none")
    return float(factor or 1.0)


def _yarn_scaling(rope: Config, factor: float) -> float:
    """What cosine and sine are multiplied by, so that longer contexts keep their sharpness."""
    given = rope.get("attention_factor")
    if given is not None:
        return float(given)

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return magnitude(float(mscale)) / magnitude(float(mscale_all_dim))
    return magnitude(1.0)


def _mrope_section(rope: Config, family: Family) -> tuple[int, int, int]:
    expect(rope, "mrope_interleaved", family.mrope_interleaved)
    section = tuple(
        int(width) for width in rope.get("mrope_section") or family.default_mrope_section
    )
    if len(section) != 3:
        raise UnsupportedModel(f"mrope_section={section} is not supported; supported: three widths")
    return section
