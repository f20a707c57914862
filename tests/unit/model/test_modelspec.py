"""Reading model folders: both config layouts, both rope spellings, clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shared.errors import UnsupportedModel
from shared.modelspec import ModelSpec

# The fields of Qwen2-VL's hub config, which is flat.
QWEN2_VL: dict[str, Any] = {
    "model_type": "qwen2_vl",
    "torch_dtype": "bfloat16",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 32768,
    "max_window_layers": 28,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 151645,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_config": {"hidden_size": 1536, "patch_size": 14, "in_chans": 3},
}
VISION_FIELDS = {name for name in QWEN2_VL if "vision" in name or "token_id" in name}
LLAMA = {k: v for k, v in QWEN2_VL.items() if k not in VISION_FIELDS | {"rope_scaling"}} | {
    "model_type": "llama"
}


def load(folder: Path, config: dict[str, Any], **files: Any) -> ModelSpec:
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return ModelSpec.load(folder)


def test_flat_config(tmp_path: Path) -> None:
    spec = load(tmp_path, QWEN2_VL)
    assert (spec.model_type, spec.dtype) == ("qwen2_vl", "bfloat16")
    assert spec.text.head_dim == 128
    assert spec.text.qkv_bias
    assert not spec.text.o_bias
    assert spec.text.tie_word_embeddings
    assert spec.text.rope.mrope_section == (16, 24, 24)
    assert spec.text.rope.rope_type == "default"
    assert spec.eos_token_ids == (151645,)
    assert spec.vision is not None
    assert spec.vision.patch_dim == 3 * 2 * 14 * 14
    assert spec.vision.num_tokens((1, 4, 6)) == 6
    assert spec.roles == ("encode", "prefill", "decode")


def test_nested_config_says_the_same(tmp_path: Path) -> None:
    text = {k: v for k, v in QWEN2_VL.items() if k not in VISION_FIELDS | {"model_type"}}
    del text["rope_scaling"], text["rope_theta"]
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 1000000.0,
        "mrope_section": [16, 24, 24],
    }
    outer = {k: v for k, v in QWEN2_VL.items() if k in VISION_FIELDS | {"model_type"}}
    nested = load(tmp_path, {**outer, "text_config": text})
    flat = load(tmp_path, QWEN2_VL)
    assert (nested.text, nested.vision, nested.dtype) == (flat.text, flat.vision, flat.dtype)


def test_generation_config_decides_the_end_tokens(tmp_path: Path) -> None:
    spec = load(tmp_path, QWEN2_VL, generation_config={"eos_token_id": [151645, 151643]})
    assert spec.eos_token_ids == (151645, 151643)


def test_preprocessor_config(tmp_path: Path) -> None:
    spec = load(
        tmp_path, QWEN2_VL, preprocessor_config={"min_pixels": 3136, "max_pixels": 12845056}
    )
    assert spec.vision is not None
    assert (spec.vision.min_pixels, spec.vision.max_pixels) == (3136, 12845056)
    other = load(tmp_path, QWEN2_VL, preprocessor_config={"size": {"shortest_edge": 784}})
    assert other.vision is not None
    assert other.vision.min_pixels == 784
    assert other.preprocessor_hash != spec.preprocessor_hash
    assert other.fingerprint == spec.fingerprint


def test_text_models_have_no_encoder(tmp_path: Path) -> None:
    spec = load(tmp_path, LLAMA)
    assert spec.vision is None
    assert spec.roles == ("prefill", "decode")
    assert spec.text.rope.mrope_section is None


def test_attention_bias_counts_for_both_projections(tmp_path: Path) -> None:
    spec = load(tmp_path, {**LLAMA, "attention_bias": True})
    assert spec.text.qkv_bias
    assert spec.text.o_bias


def test_the_fingerprint_follows_config_and_weights(tmp_path: Path) -> None:
    plain = load(tmp_path, LLAMA).fingerprint
    assert load(tmp_path, LLAMA).fingerprint == plain
    (tmp_path / "model.safetensors").write_bytes(b"12345678")
    weights = load(tmp_path, LLAMA).fingerprint
    (tmp_path / "model.safetensors").write_bytes(b"123456789")
    longer = load(tmp_path, LLAMA).fingerprint
    config = load(tmp_path, {**LLAMA, "rope_theta": 5e5}).fingerprint
    assert len({plain, weights, longer, config}) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt9"}, "model_type='gpt9' is not supported; supported: gemma3"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method='awq' is not supported"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type='longrope'.*'llama3', 'yarn'"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_type='su'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_type='linear' needs a factor"),
        ({"rope_parameters": {"sliding_attention": {}}}, "rope_parameters has .'sliding_att"),
        ({"use_sliding_window": True, "max_window_layers": 20}, "from layer 20 of 28"),
        ({"layer_types": ["full_attention", "sliding_attention"] * 14}, "layer_types.*for llama"),
        ({"layer_types": ["full_attention"] * 27}, "layer_types has 27 entries"),
        ({"layer_types": ["chunked_attention"] * 28}, "layer_types has .'chunked_attention'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (
            {"hidden_act": "gelu"},
            "hidden_act='gelu' is not supported; supported: 'gelu_py.*', 'silu'",
        ),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"torch_dtype": "float8"}, "torch_dtype='float8'"),
        ({"hidden_size": None}, "no hidden_size"),
    ],
)
def test_refusals_name_field_value_and_support(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        load(tmp_path, {**LLAMA, **change})


def test_a_window_that_no_layer_uses_is_no_reason_to_refuse(tmp_path: Path) -> None:
    load(tmp_path, {**LLAMA, "use_sliding_window": True})


def test_unreadable_folders(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"config\.json: cannot be read"):
        ModelSpec.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UnsupportedModel, match="not valid JSON"):
        ModelSpec.load(tmp_path)
