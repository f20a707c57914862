"""Configs of tiny text models: every family, rotation, window and layer pattern the decoder knows.

In: nothing. Out: transformers configs by the name under which tests ask for the model.
"""

from __future__ import annotations

from typing import Any

import transformers

VOCAB_SIZE = 160

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10_000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    **ROPE,
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
# Scaled by two magnitudes, with a ramp that isn't rounded to whole pairs.
YARN_MSCALE = {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4, "truncate": False, "beta_fast": 8.0}
MOE: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
# Shorter than every test prompt but the first, so that windows hide something.
WINDOW = 9


def text_configs() -> dict[str, Any]:
    """Name -> config."""
    return _llamas() | _qwens() | _others()


def _llamas() -> dict[str, Any]:
    t = transformers
    return {
        "llama": t.LlamaConfig(**TEXT, rope_parameters=dict(LLAMA3)),
        "llama_linear_biased_tied": t.LlamaConfig(
            **TEXT,
            rope_parameters={**ROPE, "rope_type": "linear", "factor": 4.0},
            attention_bias=True,
            tie_word_embeddings=True,
        ),
        "llama_dynamic": t.LlamaConfig(
            **TEXT, rope_parameters={**ROPE, "rope_type": "dynamic", "factor": 3.3}
        ),
        "llama_yarn_mscale": t.LlamaConfig(**TEXT, rope_parameters=dict(YARN_MSCALE)),
        "mistral": t.MistralConfig(**TEXT, rope_parameters=dict(ROPE), sliding_window=None),
        "mistral_sliding": t.MistralConfig(
            **TEXT, rope_parameters=dict(ROPE), sliding_window=WINDOW, head_dim=16
        ),
    }


def _qwens() -> dict[str, Any]:
    t = transformers
    return {
        "qwen2": t.Qwen2Config(**TEXT, rope_parameters=dict(ROPE), tie_word_embeddings=True),
        "qwen2_late_sliding": t.Qwen2Config(
            **TEXT,
            rope_parameters=dict(ROPE),
            use_sliding_window=True,
            sliding_window=WINDOW,
            max_window_layers=1,
        ),
        "qwen3": t.Qwen3Config(**TEXT, rope_parameters=dict(ROPE), head_dim=16),
        "qwen3_yarn_sliding": t.Qwen3Config(
            **TEXT,
            rope_parameters=dict(YARN),
            head_dim=16,
            use_sliding_window=True,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        "qwen3_moe": t.Qwen3MoeConfig(
            **TEXT, **MOE, rope_parameters=dict(ROPE), head_dim=16, norm_topk_prob=True
        ),
        "qwen3_moe_mixed_sliding": t.Qwen3MoeConfig(
            **TEXT,
            **MOE,
            rope_parameters=dict(ROPE),
            mlp_only_layers=[1],
            use_sliding_window=True,
            sliding_window=WINDOW,
        ),
    }


def _others() -> dict[str, Any]:
    t = transformers
    return {
        "smollm3": t.SmolLM3Config(
            **{**TEXT, "num_hidden_layers": 5}, rope_parameters=dict(ROPE), pad_token_id=0
        ),
        "smollm3_sliding": t.SmolLM3Config(
            **TEXT,
            rope_parameters=dict(ROPE),
            pad_token_id=0,
            no_rope_layers=[1, 0, 1],
            use_sliding_window=True,
            sliding_window=WINDOW,
            tie_word_embeddings=False,
        ),
        "gemma3_text": t.Gemma3TextConfig(
            **{**TEXT, "num_hidden_layers": 4},
            head_dim=16,
            sliding_window=WINDOW,
            sliding_window_pattern=3,
            query_pre_attn_scalar=24,
            rope_parameters={
                "full_attention": {**ROPE, "rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        ),
    }


TEXT_FAMILIES = tuple(text_configs())
