"""Settings of tiny vision-language models, one for each family beyond Qwen2-VL and Qwen2.5-VL.

In: nothing. Out: a config, an image processor's settings and a chat template of each family's
shape. Pictures have 16 pixels a side and patches 4, so that odd sizes already need several tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import transformers

from tests.support.text_configs import ROPE
from tests.support.tiny_tokenizer import TOKEN_IDS, VOCAB_SIZE

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_CLIP = {**_TOWER, "model_type": "clip_vision_model"}
_SIGLIP = {**_TOWER, "model_type": "siglip_vision_model", "vision_use_head": False}
_QWEN3_TOWER = {
    "depth": 3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 36,
    "deepstack_visual_indexes": [0, 2],
}
_QWEN3_ROPE = {**ROPE, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
_QWEN_TOKENS = {
    "image_token_id": TOKEN_IDS["<|image_pad|>"],
    "video_token_id": TOKEN_IDS["<|video_pad|>"],
    "vision_start_token_id": TOKEN_IDS["<|vision_start|>"],
    "vision_end_token_id": TOKEN_IDS["<|vision_end|>"],
}
_IMAGE = {"image_token_id": TOKEN_IDS["<image>"]}
_NEXT_PINPOINTS = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]
_ONEVISION_PINPOINTS = [[16, 16], [16, 32], [32, 16], [32, 48], [48, 48], [64, 64]]

_TURNS = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}END\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass(frozen=True)
class VisionFamily:
    """What `save_pretrained` and the hub put into a folder of this family.

    `image` is what the template writes for a picture, `end` what ends a turn.
    """

    config: Any
    image_processor: dict[str, Any]
    image: str
    end: str = "</s>"
    head: str = ""
    tokenizer: dict[str, str] = field(default_factory=dict)

    @property
    def chat_template(self) -> str:
        return self.head + _TURNS.replace("IMAGE", self.image).replace("END", self.end)


def vision_families() -> dict[str, VisionFamily]:
    """By the name that tests use."""
    return {**_qwens(), **_llavas(), **_others()}


def _qwens() -> dict[str, VisionFamily]:
    t = transformers
    settings = {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "patch_size": 4,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 256, "longest_edge": 4096},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    text = {**TEXT, "head_dim": 8, "rope_parameters": dict(_QWEN3_ROPE)}
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    return {
        "qwen3_vl": VisionFamily(
            t.Qwen3VLConfig(text_config=text, vision_config=dict(_QWEN3_TOWER), **_QWEN_TOKENS),
            settings,
            image,
        ),
        "qwen3_vl_moe": VisionFamily(
            t.Qwen3VLMoeConfig(
                text_config={**text, **_MOE}, vision_config=dict(_QWEN3_TOWER), **_QWEN_TOKENS
            ),
            settings,
            image,
        ),
    }


def _llavas() -> dict[str, VisionFamily]:
    t = transformers
    llama = {"model_type": "llama", **TEXT, "rope_parameters": dict(ROPE)}
    mistral = {**llama, "model_type": "mistral", "sliding_window": None}
    qwen2 = {**llama, "model_type": "qwen2"}
    square = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    return {
        "llava": VisionFamily(
            t.LlavaConfig(text_config=llama, vision_config=dict(_CLIP), **_IMAGE),
            {"image_processor_type": "CLIPImageProcessor", **square},
            "<image>\n",
        ),
        "llava_siglip_layers": VisionFamily(
            t.LlavaConfig(
                text_config=qwen2,
                vision_config=dict(_SIGLIP),
                vision_feature_layer=[-3, -1],
                vision_feature_select_strategy="full",
                **_IMAGE,
            ),
            {"image_processor_type": "SiglipImageProcessor", "size": {"height": 16, "width": 16}},
            "<image>\n",
        ),
        "llava_next": VisionFamily(
            t.LlavaNextConfig(
                text_config=mistral,
                vision_config=dict(_CLIP),
                image_grid_pinpoints=_NEXT_PINPOINTS,
                **_IMAGE,
            ),
            {
                "image_processor_type": "LlavaNextImageProcessor",
                "image_grid_pinpoints": _NEXT_PINPOINTS,
                **square,
            },
            "<image>\n",
        ),
        "llava_onevision": VisionFamily(
            t.LlavaOnevisionConfig(
                text_config=qwen2,
                vision_config=dict(_SIGLIP),
                image_grid_pinpoints=_ONEVISION_PINPOINTS,
                vision_aspect_ratio="anyres_max_3",
                **_IMAGE,
            ),
            {
                "image_processor_type": "LlavaOnevisionImageProcessor",
                "size": {"height": 16, "width": 16},
                "image_grid_pinpoints": _ONEVISION_PINPOINTS,
            },
            "<image>\n",
        ),
    }


def _others() -> dict[str, VisionFamily]:
    return {"gemma3": _gemma3(), "internvl": _internvl(), **_idefics()}


def _gemma3() -> VisionFamily:
    return VisionFamily(
        transformers.Gemma3Config(
            text_config={
                **TEXT,
                "num_hidden_layers": 4,
                "head_dim": 16,
                "sliding_window": 24,
                "sliding_window_pattern": 3,
                "query_pre_attn_scalar": 24,
            },
            vision_config=dict(_SIGLIP),
            mm_tokens_per_image=4,
            boi_token_index=TOKEN_IDS["<start_of_image>"],
            eoi_token_index=TOKEN_IDS["<end_of_image>"],
            image_token_index=TOKEN_IDS["<image_soft_token>"],
        ),
        {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 16, "width": 16}},
        "<start_of_image>",
        head="{{ bos_token }}",
        tokenizer={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
    )


def _internvl() -> VisionFamily:
    return VisionFamily(
        transformers.InternVLConfig(
            text_config={"model_type": "qwen2", **TEXT, "rope_parameters": dict(ROPE)},
            vision_config={**_TOWER, "image_size": [16, 16], "patch_size": [4, 4]},
            image_token_id=TOKEN_IDS["<IMG_CONTEXT>"],
            image_seq_length=4,
            tie_word_embeddings=False,
        ),
        {
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "size": {"height": 16, "width": 16},
            "crop_to_patches": False,
            "max_patches": 6,
        },
        "<IMG_CONTEXT>\n",
        tokenizer={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<|video_pad|>",
        },
    )


def _idefics() -> dict[str, VisionFamily]:
    t = transformers
    llama = {"model_type": "llama", **TEXT, "rope_parameters": dict(ROPE)}
    settings = {"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 16}}
    end = "<end_of_utterance>"
    return {
        "idefics3": VisionFamily(
            t.Idefics3Config(text_config=llama, vision_config=dict(_TOWER), **_IMAGE),
            {"image_processor_type": "Idefics3ImageProcessor", **settings},
            "<image>",
            end,
        ),
        "smolvlm": VisionFamily(
            t.SmolVLMConfig(text_config=llama, vision_config=dict(_TOWER), **_IMAGE),
            {"image_processor_type": "SmolVLMImageProcessor", **settings},
            "<image>",
            end,
        ),
        "smolvlm_whole_pictures": VisionFamily(
            t.SmolVLMConfig(text_config=llama, vision_config=dict(_TOWER), **_IMAGE),
            {
                "image_processor_type": "SmolVLMImageProcessor",
                **settings,
                "do_image_splitting": False,
            },
            "<image>",
            end,
        ),
    }


VISION_FAMILY_NAMES = tuple(vision_families())
