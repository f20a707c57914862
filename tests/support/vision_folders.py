"""Whole model folders of the vision families, and transformers' own processor for each.

In: a family's name and a folder. Out: the folder with weights, tokenizer, chat template and
settings as on the hub; the real processor, also where its constructor asks for torchvision.
"""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from shared.media.content_key import content_key
from shared.media.picture import PictureLimits, open_picture
from shared.modelspec import ModelSpec
from shared.text.chat_template import ChatTemplate
from shared.text.prompt import ChatMessage, Medium, Prompt, PromptBuilder
from shared.text.tokenizer import TextTokenizer
from tests.support.folders import built_once
from tests.support.models import quiet, spread_weights
from tests.support.tiny_tokenizer import tiny_tokenizer
from tests.support.vision_families import VisionFamily, vision_families

_PROCESSORS = {
    "llava": "LlavaProcessor",
    "llava_next": "LlavaNextProcessor",
    "llava_onevision": "LlavaOnevisionProcessor",
    "gemma3": "Gemma3Processor",
    "internvl": "InternVLProcessor",
    "idefics3": "Idefics3Processor",
    "smolvlm": "SmolVLMProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
    "qwen3_vl_moe": "Qwen3VLProcessor",
}
_WITH_VIDEO = ("llava_onevision", "internvl", "smolvlm", "qwen3_vl", "qwen3_vl_moe")


def build_vision_folder(
    name: str, folder: Path, *, seed: int = 0, max_shard_size: str = "50GB"
) -> Path:
    """Write everything that a folder on the hub has."""
    family = vision_families()[name]
    with quiet():
        torch.manual_seed(seed)
        model = transformers.AutoModelForImageTextToText.from_config(
            family.config, dtype=torch.float32
        )
        spread_weights(model, seed)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer_config = {"bos_token": "<s>", "eos_token": "</s>", **family.tokenizer}
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    for file, content in (
        ("tokenizer_config.json", tokenizer_config),
        ("preprocessor_config.json", family.image_processor),
    ):
        (folder / file).write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text(family.chat_template)
    return folder


@pytest.fixture(scope="session")
def vision_dir_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family name -> its folder, built once a session."""
    return built_once(build_vision_folder, tmp_path_factory)


def hf_processor(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """transformers' processor over the Pillow image processor, without a video processor."""
    config = json.loads((folder / "config.json").read_text())
    model_type, family = config["model_type"], _family_of(folder)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=dict(family.tokenizer),
    )
    tokenizer.chat_template = (folder / "chat_template.jinja").read_text()
    images = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    module_name = "qwen3_vl" if model_type == "qwen3_vl_moe" else model_type
    module = importlib.import_module(f"transformers.models.{module_name}.processing_{module_name}")
    # The check imports video processors, which insist on torchvision; pictures need none.
    monkeypatch.setattr(
        transformers.ProcessorMixin, "check_argument_for_proper_class", lambda *_: None
    )
    if model_type == "smolvlm":
        monkeypatch.setattr(module, "num2words", str)  # only clips are counted in words
    processor_class = getattr(module, _PROCESSORS[model_type])
    options = {"video_processor": None} if model_type in _WITH_VIDEO else {}
    return processor_class(images, tokenizer, **options, **_processor_settings(config))


def _family_of(folder: Path) -> VisionFamily:
    template = (folder / "chat_template.jinja").read_text()
    config = json.loads((folder / "config.json").read_text())
    return next(
        family
        for family in vision_families().values()
        if family.config.model_type == config["model_type"] and family.chat_template == template
    )


def _processor_settings(config: dict[str, Any]) -> dict[str, Any]:
    """processor_config.json as the hub has it for each family."""
    strategy = config.get("vision_feature_select_strategy")
    is_clip = config["vision_config"].get("model_type") == "clip_vision_model"
    llava = {
        "patch_size": 4,
        "vision_feature_select_strategy": strategy,
        "num_additional_image_tokens": int(is_clip),
    }
    return {
        "llava": llava,
        "llava_next": llava,
        "llava_onevision": {
            "num_image_tokens": 16,
            "vision_feature_select_strategy": strategy,
            "vision_aspect_ratio": config.get("vision_aspect_ratio"),
        },
        "gemma3": {"image_seq_length": 4},
        "internvl": {"image_seq_length": 4},
        "idefics3": {"image_seq_len": 4},
        "smolvlm": {"image_seq_len": 4},
    }.get(config["model_type"], {})


def picture_file(height: int, width: int, seed: int = 0) -> bytes:
    """A PNG of noise, so that every pixel counts."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def our_prompt(folder: Path, parts: Sequence[str | bytes]) -> Prompt:
    """One user turn of texts and picture files, as a gateway builds it."""
    spec, tokenizer = ModelSpec.load(folder), TextTokenizer.load(folder)
    assert spec.vision is not None
    builder = PromptBuilder(
        tokenizer,
        ChatTemplate.load(folder),
        spec.vision.image_token_id,
        spec.vision.template_token_id,
    )
    content = tuple(_measured(part, spec) if isinstance(part, bytes) else part for part in parts)
    return builder.build([ChatMessage("user", content)])


def _measured(data: bytes, spec: ModelSpec) -> Medium:
    picture = open_picture(data, PictureLimits())
    assert spec.vision is not None
    layout = spec.vision.sizing.measure(picture.height, picture.width)
    key = content_key("0" * 64, spec.fingerprint, spec.preprocessor_hash)
    return Medium.of("0" * 64, key, layout)


def hf_inputs(processor: Any, parts: Sequence[str | bytes]) -> Any:
    """The same turn through transformers' processor."""
    content = [
        {"type": "image"} if isinstance(part, bytes) else {"type": "text", "text": part}
        for part in parts
    ]
    text = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    pictures = [Image.open(io.BytesIO(part)) for part in parts if isinstance(part, bytes)]
    starts = text.startswith(processor.tokenizer.bos_token)
    return processor(
        images=pictures or None,
        text=[text],
        add_special_tokens=not starts,
        return_tensors="pt",
    )
