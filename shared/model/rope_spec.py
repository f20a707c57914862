"""The rotary embedding that a config asks for.

In: the language part of a config, in either of its two spellings. Out: a `RopeSpec`.
Knows no torch; `rope.py` turns the spec into angles.
"""

from __future__ import annotations

from dataclasses import dataclass

from shared.errors import UnsupportedModel
from shared.model.config_fields import Config, expect, required
from shared.model.registry import Family

SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3")
SUPPORTED_MROPE_TYPES = ("default", "mrope")


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding of the language model. Factors are 1.0 where the type has none.

    `mrope_section`: pairs of channels that follow the temporal, height and width position;
    None for plain one-dimensional positions.
    """

    rope_type: str
    theta: float
    mrope_section: tuple[int, int, int] | None = None
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_tokens: int = 0

    @classmethod
    def of(cls, text: Config, family: Family) -> RopeSpec:
        """Read `rope_parameters`, or the older `rope_scaling` with `rope_theta`."""
        rope: Config = text.get("rope_scaling") or text.get("rope_parameters") or {}
        expect(rope, "partial_rotary_factor", 1.0)
        expect(text, "partial_rotary_factor", 1.0)
        theta = rope.get("rope_theta") or text.get("rope_theta") or family.default_rope_theta
        original = text.get("original_max_position_embeddings") or rope.get(
            "original_max_position_embeddings"
        )
        return cls(
            rope_type=_rope_type(rope, family),
            theta=float(theta),
            mrope_section=_mrope_section(rope) if family.mrope else None,
            factor=float(rope.get("factor") or 1.0),
            low_freq_factor=float(rope.get("low_freq_factor") or 1.0),
            high_freq_factor=float(rope.get("high_freq_factor") or 1.0),
            original_max_tokens=int(original or required(text, "max_position_embeddings")),
        )


def _rope_type(rope: Config, family: Family) -> str:
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    supported = SUPPORTED_MROPE_TYPES if family.mrope else SUPPORTED_ROPE_TYPES
    if rope_type not in supported:
        raise UnsupportedModel(f"rope_type={rope_type!r} is not supported; supported: {supported}")
    # "mrope" is the old name of default frequencies on three axes.
    return "default" if rope_type == "mrope" else str(rope_type)


def _mrope_section(rope: Config) -> tuple[int, int, int]:
    section = tuple(int(width) for width in rope.get("mrope_section") or (16, 24, 24))
    if len(section) != 3:
        raise UnsupportedModel(f"mrope_section={section} is not supported; supported: three widths")
    return section
