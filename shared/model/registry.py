"""The one table of what differs between model families.

In: a `model_type` from a config, or a tensor name from a checkpoint. Out: facts. This module does
not know torch, transformers or the file system, so the gateway may import it. A new family of the
Llama kind is one new row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from shared.errors import UnsupportedModel
from shared.model import config_defaults, tower_families
from shared.model.tower_families import TowerFamily

Part = Literal["language", "tower"]

# Which layers see a window of the context only; `layer_types` in a config decides before these
# rules do, except for "none" and "all", where it may only agree.
#   none        no layer
#   all         every layer, as soon as the config has a window
#   late        layers from `max_window_layers` on, if `use_sliding_window`
#   unrotated   layers without rotary positions, if `use_sliding_window`
#   pattern     all but every `sliding_window_pattern`-th layer
SlidingRule = Literal["none", "all", "late", "unrotated", "pattern"]


@dataclass(frozen=True, slots=True)
class Family:
    """What one `model_type` does differently from a plain Llama decoder.

    `qkv_bias=None` means that the config's `attention_bias` decides, for the output projection too.
    `defaults` are the values of config fields that a file may leave out.

    Rotation: `mrope` turns on three position axes, whose channels lie in blocks or interleaved;
    `mrope_per_frame` means that each frame of a clip is a placeholder run of its own;
    `default_local_rope_theta` gives sliding layers a rotation of their own; `nope` lets the config
    name layers without rotation.

    Gemma: `norm_unit_offset` scales by `1 + weight`, `post_norms` normalises each block's output
    too, `scaled_embedding` multiplies token embeddings by the root of their width,
    `query_scalar` reads the query's scale from `query_pre_attn_scalar`, `bidirectional_media` lets
    the tokens of one picture see each other.

    `deepstack`: features of inner tower layers are added after the first decoder layers.
    """

    model_type: str
    qkv_bias: bool | None = None
    qk_norm: bool = False
    mrope: bool = False
    default_rope_theta: float = 10_000.0
    default_head_dim: int | None = None
    tower: TowerFamily | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict, hash=False)
    sliding: SlidingRule = "none"
    moe: bool = False
    mrope_interleaved: bool = False
    mrope_per_frame: bool = False
    default_mrope_section: tuple[int, int, int] = (16, 24, 24)
    default_local_rope_theta: float | None = None
    nope: bool = False
    activation_field: str = "hidden_act"
    norm_unit_offset: bool = False
    post_norms: bool = False
    scaled_embedding: bool = False
    query_scalar: bool = False
    bidirectional_media: bool = False
    deepstack: bool = False

    def classify(self, tensor_name: str) -> tuple[Part, str] | None:
        """Split a checkpoint tensor name into the part it belongs to and its name inside that part.

        None for names outside every known prefix.
        """
        if self.tower is not None:
            local_name = self.tower.local_name(tensor_name)
            if local_name is not None:
                return "tower", local_name
        for prefix, local_prefix in _LANGUAGE_PREFIXES:
            if tensor_name.startswith(prefix):
                return "language", local_prefix + tensor_name.removeprefix(prefix)
        return None


# What the language parts of Qwen3-VL and Qwen3-VL-MoE share.
_QWEN3_VL_LANGUAGE: dict[str, Any] = {
    "qk_norm": True,
    "mrope": True,
    "mrope_interleaved": True,
    "mrope_per_frame": True,
    "default_mrope_section": (24, 20, 20),
    "default_rope_theta": 500_000.0,
    "deepstack": True,
}

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
        Family("llama", defaults=config_defaults.LLAMA),
        Family("mistral", qkv_bias=False, sliding="all", defaults=config_defaults.MISTRAL),
        Family("qwen2", qkv_bias=True, sliding="late", defaults=config_defaults.QWEN2),
        Family(
            "qwen3",
            qk_norm=True,
            default_head_dim=128,
            sliding="late",
            defaults={"sliding_window": 4096, "max_window_layers": 28},
        ),
        Family(
            "qwen3_moe",
            qk_norm=True,
            moe=True,
            sliding="all",
            defaults={"sliding_window": 4096},
        ),
        Family(
            "smollm3",
            nope=True,
            sliding="unrotated",
            default_rope_theta=2_000_000.0,
            defaults={"no_rope_layer_interval": 4, "tie_word_embeddings": True},
        ),
        Family(
            "gemma3_text",
            qk_norm=True,
            sliding="pattern",
            default_rope_theta=1_000_000.0,
            default_local_rope_theta=10_000.0,
            activation_field="hidden_activation",
            norm_unit_offset=True,
            post_norms=True,
            scaled_embedding=True,
            query_scalar=True,
            bidirectional_media=True,
            defaults=config_defaults.GEMMA3,
        ),
        # Language parts that come inside a vision-language config under a name of their own.
        Family("qwen3_vl_text", default_head_dim=128, **_QWEN3_VL_LANGUAGE),
        Family(
            "qwen3_vl_moe_text",
            moe=True,
            defaults={"norm_topk_prob": True},
            **_QWEN3_VL_LANGUAGE,
        ),
        Family(
            "qwen2_vl",
            sliding="late",
            defaults={"sliding_window": 4096, "max_window_layers": 80},
            qkv_bias=True,
            mrope=True,
            default_rope_theta=1_000_000.0,
            tower=tower_families.QWEN2_VL,
        ),
        Family(
            "qwen2_5_vl",
            sliding="late",
            defaults={"sliding_window": 4096, "max_window_layers": 80},
            qkv_bias=True,
            mrope=True,
            default_rope_theta=1_000_000.0,
            tower=tower_families.QWEN2_5_VL,
        ),
        Family("qwen3_vl", tower=tower_families.QWEN3_VL),
        Family("qwen3_vl_moe", tower=tower_families.QWEN3_VL_MOE),
        Family("llava", defaults=config_defaults.LLAMA, tower=tower_families.LLAVA),
        Family("llava_next", defaults=config_defaults.LLAMA, tower=tower_families.LLAVA_NEXT),
        Family("llava_onevision", tower=tower_families.LLAVA_ONEVISION),
        Family("gemma3", tower=tower_families.GEMMA3),
        Family("internvl", tower=tower_families.INTERNVL),
        Family("idefics3", defaults=config_defaults.LLAMA, tower=tower_families.IDEFICS3),
        Family("smolvlm", defaults=config_defaults.LLAMA, tower=tower_families.SMOLVLM),
        Family(
            "qwen2_audio",
            qkv_bias=True,
            sliding="late",
            defaults=config_defaults.QWEN2,
            tower=tower_families.QWEN2_AUDIO,
        ),
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


def language_family(config: Mapping[str, Any]) -> Family:
    """The family whose language facts a config follows.

    A config with a tower may nest any family's language model (`text_config.model_type`), or its
    own under a name that ends in `_text`; flat configs are their own.
    """
    outer = family_of(config.get("model_type"))
    text = config.get("text_config")
    inner = text.get("model_type") if isinstance(text, Mapping) else None
    if inner is None or inner in FAMILIES:
        return outer if inner is None else FAMILIES[inner]
    if str(inner).removesuffix("_text") == outer.model_type:
        return outer
    supported = ", ".join(sorted(name for name, family in FAMILIES.items() if family.tower is None))
    raise UnsupportedModel(
        f"text_config.model_type={inner!r} is not supported; supported: {supported}"
    )
