"""The shape of a language model, read from its config.

In: a parsed config and the family it follows. Out: a `TextSpec`, layer by layer where layers
differ. Refuses what the decoder cannot do exactly. Knows neither torch nor the files of a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from shared.errors import UnsupportedModel
from shared.model.config_fields import Config, expect, required
from shared.model.layer_spec import LayerSpec, layer_specs
from shared.model.registry import Family
from shared.model.rope_spec import RopeSpec

SUPPORTED_ACTIVATIONS = ("gelu_pytorch_tanh", "silu")
# What Qwen3-VL's towers have where their config does not say.
_DEFAULT_DEEPSTACK_LAYERS = 3


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """Mixture of experts: each token goes to `experts_per_token` of `num_experts` small MLPs.

    `normalize_weights`: the chosen experts' weights add up to one.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    normalize_weights: bool


@dataclass(frozen=True, slots=True)
class TextSpec:
    """Shape of the language model.

    `rope` is the rotation of layers with full attention; `layers` says per layer what applies.
    `query_scale` multiplies queries on top of attention's `head_dim ** -0.5`.
    A media row carries `1 + num_deepstack_layers` vectors of `hidden_size`: the input embedding and
    what is added after decoder layer 0, 1, ...
    """

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
    layers: tuple[LayerSpec, ...]
    activation: str = "silu"
    moe: MoeSpec | None = None
    norm_unit_offset: bool = False
    post_norms: bool = False
    embedding_scale: float = 1.0
    query_scale: float = 1.0
    bidirectional_media: bool = False
    mrope_per_frame: bool = False
    num_deepstack_layers: int = 0

    @property
    def sliding_windows(self) -> tuple[int | None, ...]:
        """Per layer, how many tokens a token sees, itself included; None for all before it."""
        return tuple(layer.sliding_window for layer in self.layers)

    @property
    def ropes(self) -> tuple[RopeSpec, ...]:
        """The different rotations of this model's layers, in order of appearance."""
        return tuple(dict.fromkeys(layer.rope for layer in self.layers if layer.rope is not None))

    @property
    def embedding_width(self) -> int:
        """Values of one media row."""
        return self.hidden_size * (1 + self.num_deepstack_layers)

    @classmethod
    def of(cls, config: Config, family: Family) -> TextSpec:
        """Read the language part of `config`, nested (transformers) or flat (hub)."""
        text: Config = {**family.defaults, **text_config(config)}
        _refuse_unsupported(text)
        num_heads = int(required(text, "num_attention_heads"))
        hidden_size = int(required(text, "hidden_size"))
        head_dim = int(text.get("head_dim") or family.default_head_dim or hidden_size // num_heads)
        attention_bias = bool(text.get("attention_bias", False))
        rope = RopeSpec.of(text, family)
        return cls(
            hidden_size=hidden_size,
            num_layers=int(required(text, "num_hidden_layers")),
            num_heads=num_heads,
            num_kv_heads=int(text.get("num_key_value_heads") or num_heads),
            head_dim=head_dim,
            intermediate_size=int(required(text, "intermediate_size")),
            vocab_size=int(required(text, "vocab_size")),
            rms_norm_eps=float(required(text, "rms_norm_eps")),
            rope=rope,
            qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
            o_bias=attention_bias if family.qkv_bias is None else False,
            qk_norm=family.qk_norm,
            tie_word_embeddings=_is_tied(config, text),
            max_context_tokens=_max_context_tokens(text, rope),
            layers=layer_specs(text, family),
            activation=_activation(text, family),
            moe=_moe(text) if family.moe else None,
            norm_unit_offset=family.norm_unit_offset,
            post_norms=family.post_norms,
            embedding_scale=math.sqrt(hidden_size) if family.scaled_embedding else 1.0,
            query_scale=_query_scale(text, head_dim) if family.query_scalar else 1.0,
            bidirectional_media=family.bidirectional_media,
            mrope_per_frame=family.mrope_per_frame,
            num_deepstack_layers=_deepstack_layers(config, text) if family.deepstack else 0,
        )


def text_config(config: Config) -> Config:
    """The language model's fields, nested (transformers) or at the top level (hub)."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def _refuse_unsupported(text: Config) -> None:
    expect(text, "mlp_bias", False)
    expect(text, "attn_logit_softcapping", None)
    expect(text, "final_logit_softcapping", None)
    expect(text, "use_bidirectional_attention", False)


def _activation(text: Config, family: Family) -> str:
    name = text.get(family.activation_field, "silu")
    if name not in SUPPORTED_ACTIVATIONS:
        raise UnsupportedModel(
            f"{family.activation_field}={name!r} is not supported; "
            f"supported: {', '.join(map(repr, SUPPORTED_ACTIVATIONS))}"
        )
    return str(name)


def _is_tied(config: Config, text: Config) -> bool:
    """The outer config decides, because the output head belongs to the whole model."""
    tied = config.get("tie_word_embeddings")
    return bool(text.get("tie_word_embeddings") if tied is None else tied)


def _max_context_tokens(text: Config, rope: RopeSpec) -> int:
    """Configs with YaRN may still name the length before stretching."""
    given = int(required(text, "max_position_embeddings"))
    if rope.rope_type != "yarn":
        return given
    return max(given, int(rope.original_max_tokens * rope.factor))


def _query_scale(text: Config, head_dim: int) -> float:
    return math.sqrt(head_dim / float(required(text, "query_pre_attn_scalar")))


def _moe(text: Config) -> MoeSpec:
    # transformers writes the first name, hub checkpoints the second.
    num_experts = int(text.get("num_local_experts") or required(text, "num_experts"))
    per_token = int(required(text, "num_experts_per_tok"))
    if not 1 <= per_token <= num_experts:
        raise UnsupportedModel(
            f"num_experts_per_tok={per_token} is not supported; supported: 1 to {num_experts}"
        )
    return MoeSpec(
        num_experts=num_experts,
        experts_per_token=per_token,
        intermediate_size=int(required(text, "moe_intermediate_size")),
        normalize_weights=bool(text.get("norm_topk_prob", False)),
    )


def _deepstack_layers(config: Config, text: Config) -> int:
    """One decoder layer per tapped tower layer; none without a tower."""
    vision = config.get("vision_config")
    if not isinstance(vision, Mapping):
        return 0
    tapped = vision.get("deepstack_visual_indexes")
    count = _DEFAULT_DEEPSTACK_LAYERS if tapped is None else len(tapped)
    num_layers = int(required(text, "num_hidden_layers"))
    if count > num_layers:
        raise UnsupportedModel(
            f"vision_config.deepstack_visual_indexes has {count} layers, "
            f"the language model only {num_layers}"
        )
    return count
