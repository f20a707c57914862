"""The one table of what differs between model families.

In: a `model_type` from a config, or a tensor name from a checkpoint. Out: facts. This module does
not know torch, transformers or the file system, so the gateway may import it. A new family of the
Llama kind is one new row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shared.errors import UnsupportedModel
from shared.model import tower_families
from shared.model.tower_families import TowerFamily

Part = Literal["language", "vision"]


@dataclass(frozen=True, slots=True)
class Family:
    """What one `model_type` does differently from a plain Llama decoder.

    `qkv_bias=None` means that the config's `attention_bias` decides, for the output projection too.
    """

    model_type: str
    qkv_bias: bool | None = None
    qk_norm: bool = False
    mrope: bool = False
    default_rope_theta: float = 10_000.0
    default_head_dim: int | None = None
    tower: TowerFamily | None = None

    def classify(self, tensor_name: str) -> tuple[Part, str] | None:
        """Split a checkpoint tensor name into the part it belongs to and its name inside that part.

        None for names outside every known prefix.
        """
        if self.tower is not None:
            local_name = self.tower.local_name(tensor_name)
            if local_name is not None:
                return "vision", local_name
        for prefix, local_prefix in _LANGUAGE_PREFIXES:
            if tensor_name.startswith(prefix):
                return "language", local_prefix + tensor_name.removeprefix(prefix)
        return None


# Longest first: hub checkpoints, transformers' current layout and its older one all differ.
_LANGUAGE_PREFIXES = (
    ("model.language_model.", ""),
    ("model.text_model.", ""),
    ("language_model.model.", ""),
    ("language_model.lm_head.", "lm_head."),
    ("lm_head.", "lm_head."),
    ("model.", ""),
)

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama"),
        Family("qwen2", qkv_bias=True),
        Family("qwen3", qk_norm=True, default_head_dim=128),
        Family(
            "qwen2_vl",
            qkv_bias=True,
            mrope=True,
            default_rope_theta=1_000_000.0,
            tower=tower_families.QWEN2_VL,
        ),
        Family(
            "qwen2_5_vl",
            qkv_bias=True,
            mrope=True,
            default_rope_theta=1_000_000.0,
            tower=tower_families.QWEN2_5_VL,
        ),
        Family("qwen3_vl", tower=tower_families.QWEN3_VL),
        Family("qwen3_vl_moe", tower=tower_families.QWEN3_VL_MOE),
        Family("llava", tower=tower_families.LLAVA),
        Family("llava_next", tower=tower_families.LLAVA_NEXT),
        Family("llava_onevision", tower=tower_families.LLAVA_ONEVISION),
        Family("gemma3", tower=tower_families.GEMMA3),
        Family("internvl", tower=tower_families.INTERNVL),
        Family("idefics3", tower=tower_families.IDEFICS3),
        Family("smolvlm", tower=tower_families.SMOLVLM),
    )
}


def family_of(model_type: object) -> Family:
    """The family with this `model_type`; `UnsupportedModel` names the supported ones otherwise."""
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        supported = ", ".join(sorted(FAMILIES))
        raise UnsupportedModel(
            f"model_type={model_type!r} is not supported; supported: {supported}"
        )
    return family
