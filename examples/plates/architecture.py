"""The demo model's size, in Hugging Face's Qwen2.5-VL layout, and the files that go with its
weights."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2VLImageProcessorPil,
)

PATCH_PX = 14
MERGE = 2
TOKEN_PX = PATCH_PX * MERGE
"""Side of the square of pixels that becomes one token of the language model."""
MIN_PIXELS = 56 * 56
MAX_PIXELS = 224 * 224
VOCAB = 768


def config(tokenizer: Tokenizer) -> Qwen2_5_VLConfig:
    """About 4.4 million parameters: a vision tower of 4 blocks (2 of them windowed) and 4 decoder
    layers."""
    token = tokenizer.token_to_id
    return Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        text_config={
            "vocab_size": VOCAB,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 6, 6],
            },
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_heads": 6,
            "patch_size": PATCH_PX,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "window_size": 112,
            "out_hidden_size": 192,
            "fullatt_block_indexes": [1, 3],
            "tokens_per_second": 2,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
        dtype="float32",
    )


def image_processor() -> Qwen2VLImageProcessorPil:
    """Shrinks to at most 224 x 224 pixels' worth and leaves small pictures small."""
    return Qwen2VLImageProcessorPil(
        min_pixels=MIN_PIXELS,
        max_pixels=MAX_PIXELS,
        patch_size=PATCH_PX,
        merge_size=MERGE,
        temporal_patch_size=2,
    )


def save_settings(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes config.json, generation_config.json and preprocessor_config.json."""
    settings = config(tokenizer)
    settings.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=settings.text_config.bos_token_id,
        eos_token_id=[settings.text_config.eos_token_id],
        pad_token_id=settings.text_config.pad_token_id,
        do_sample=False,
        max_new_tokens=64,
    ).save_pretrained(folder)
    processor = image_processor()
    mean, std = processor.image_mean, processor.image_std
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "Qwen2VLImageProcessor",
                "processor_class": "Qwen2_5_VLProcessor",
                "min_pixels": MIN_PIXELS,
                "max_pixels": MAX_PIXELS,
                "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
                "patch_size": PATCH_PX,
                "merge_size": MERGE,
                "temporal_patch_size": 2,
                "do_convert_rgb": True,
                "do_resize": True,
                "do_rescale": True,
                "do_normalize": True,
                "resample": 3,
                "rescale_factor": 1 / 255,
                "image_mean": list(mean),
                "image_std": list(std),
            },
            indent=2,
        )
        + "\n"
    )
