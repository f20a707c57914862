"""What configs of the text families mean, layer by layer, with fields left out as on the hub."""

from __future__ import annotations

from typing import Any

import pytest

from shared.errors import UnsupportedModel
from shared.model.registry import FAMILIES, language_family
from shared.model.text_spec import TextSpec

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 1000,
    "rope_theta": 10000.0,
}
# text_config of google/gemma-3-4b-it, as the hub has it.
GEMMA3_4B = {
    "model_type": "gemma3_text",
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 34,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 800}


def read(model_type: str, **fields: Any) -> TextSpec:
    config = {"model_type": model_type, **SMALL, **fields}
    return TextSpec.of(config, language_family(config))


def windows(model_type: str, **fields: Any) -> list[int | None]:
    return list(read(model_type, **fields).sliding_windows)


def test_a_sparse_gemma_config() -> None:
    spec = TextSpec.of(
        {"model_type": "gemma3_text", "text_config": GEMMA3_4B}, FAMILIES["gemma3_text"]
    )
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (8, 4, 256)
    assert spec.sliding_windows[:7] == (*[1024] * 5, None, 1024)
    assert spec.sliding_windows.count(None) == 5
    full, local = spec.layers[5].rope, spec.layers[0].rope
    assert full is not None
    assert local is not None
    assert (full.theta, full.rope_type, full.factor) == (1_000_000.0, "linear", 8.0)
    assert (local.theta, local.rope_type, local.factor) == (10_000.0, "default", 1.0)
    assert spec.ropes == (local, full)
    assert spec.tie_word_embeddings
    assert spec.embedding_scale == 2560**0.5
    assert spec.query_scale == 1.0
    assert spec.activation == "gelu_pytorch_tanh"
    assert spec.bidirectional_media


def test_gemma_queries_may_have_a_scale_of_their_own() -> None:
    spec = read("gemma3_text", head_dim=128, query_pre_attn_scalar=168)
    assert spec.query_scale == pytest.approx((128 / 168) ** 0.5)


def test_a_nested_llama_config_leaves_most_fields_out() -> None:
    text = {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32064}
    spec = TextSpec.of({"text_config": text}, FAMILIES["llama"])
    assert (spec.hidden_size, spec.num_layers, spec.num_kv_heads) == (4096, 32, 32)
    assert (spec.max_context_tokens, spec.vocab_size) == (4096, 32064)


@pytest.mark.parametrize(
    ("model_type", "fields", "expected"),
    [
        ("mistral", {"sliding_window": 7}, [7] * 6),
        ("mistral", {"sliding_window": None}, [None] * 6),
        ("mistral", {}, [4096] * 6),
        ("qwen2", {"sliding_window": 7, "max_window_layers": 4}, [None] * 6),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 4},
            [*[None] * 4, 7, 7],
        ),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 7,
                "layer_types": ["sliding_attention", "full_attention"] * 3,
            },
            [7, None] * 3,
        ),
        ("gemma3_text", {"sliding_window": 7, "sliding_window_pattern": 2}, [7, None] * 3),
        (
            "smollm3",
            {"use_sliding_window": True, "sliding_window": 7},
            [*[None] * 3, 7, None, None],
        ),
    ],
)
def test_windows(model_type: str, fields: dict[str, Any], expected: list[int | None]) -> None:
    assert windows(model_type, **fields) == expected


def test_layers_without_rotation() -> None:
    every_fourth = [layer.rope is None for layer in read("smollm3").layers]
    assert every_fourth == [False, False, False, True, False, False]
    listed = read("smollm3", no_rope_layers=[0, 1, 0, 1, 0, 1, 0, 0])
    assert [layer.rope is None for layer in listed.layers] == [True, False] * 3


def test_experts() -> None:
    fields = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    spec = read("qwen3_moe", **fields, mlp_only_layers=[1], decoder_sparse_step=2)
    assert [layer.is_moe for layer in spec.layers] == [False, False, False, True, False, True]
    assert spec.moe is not None
    assert not spec.moe.normalize_weights
    assert spec.sliding_windows == (None,) * 6
    always = read("qwen3_vl_moe_text", **fields).moe
    assert always is not None
    assert always.normalize_weights


def test_yarn_stretches_the_context() -> None:
    spec = read("qwen3", rope_scaling=YARN)
    assert spec.max_context_tokens == 3200
    assert spec.rope.attention_scaling == pytest.approx(1.1386294361119891)
    assert (
        read("qwen3", rope_scaling={**YARN, "attention_factor": 1.5}).rope.attention_scaling == 1.5
    )
    without = {"rope_type": "yarn", "original_max_position_embeddings": 500}
    assert read("qwen3", rope_scaling=without).rope.factor == 2.0


def test_deepstack_widens_media_rows() -> None:
    vision = {"deepstack_visual_indexes": [5, 11]}
    spec = read("qwen3_vl_text", vision_config=vision, rope_scaling={"mrope_section": [4, 2, 2]})
    assert spec.num_deepstack_layers == 2
    assert spec.embedding_width == 3 * 64
    assert spec.rope.mrope_interleaved
    assert read("qwen3_vl_text").num_deepstack_layers == 0
    assert read("qwen3_vl_text", vision_config={}).num_deepstack_layers == 3


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "qwen2_vl"}, "qwen2_vl"),
        ({"model_type": "qwen2_vl", "text_config": {}}, "qwen2_vl"),
        ({"model_type": "qwen2_vl", "text_config": {"model_type": "qwen2_vl_text"}}, "qwen2_vl"),
        ({"model_type": "qwen2_vl", "text_config": {"model_type": "mistral"}}, "mistral"),
    ],
)
def test_the_language_family_is_the_nested_one(config: dict[str, Any], expected: str) -> None:
    assert language_family(config).model_type == expected


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("qwen2_vl", {"text_config": {"model_type": "opt"}}, "text_config.model_type='opt'.*llama"),
        (
            "mistral",
            {"layer_types": ["full_attention"] * 6},
            "layer_types=.'full_attention'. is not supported for mistral",
        ),
        (
            "qwen3",
            {"layer_types": ["sliding_attention"] * 6},
            "layer_types has sliding_attention, which needs use_sliding_window=True",
        ),
        ("mistral", {"sliding_window": 0}, "sliding_window=0 is not supported"),
        ("smollm3", {"no_rope_layers": [1, 1]}, "no_rope_layers has 2 entries"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ("gemma3_text", {"hidden_activation": "relu"}, "hidden_activation='relu'"),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok=5"),
        ("qwen2_vl", {"rope_scaling": {"mrope_interleaved": True}}, "mrope_interleaved=True"),
        (
            "qwen3_vl_text",
            {"vision_config": {"deepstack_visual_indexes": [0] * 7}},
            "deepstack_visual_indexes has 7 layers, the language model only 6",
        ),
    ],
)
def test_refusals(model_type: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        read(model_type, **fields)
