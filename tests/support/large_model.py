"""A model folder whose parts are large enough to see in a process' resident size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from shared.demo import model_dir

_TEXT = {
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_hidden_layers": 8,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "layer_types": ["full_attention"] * 8,
}
_VISION = {
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_heads": 24,
    "depth": 8,
    "out_hidden_size": 768,
}


def build_large_vl_model(folder: Path) -> Path:
    """The demo model's folder with a language part and a vision part of some 250 MiB each.

    All weights are zero: only their size matters here.
    """
    for file in model_dir().iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= _TEXT
    config["vision_config"] |= _VISION
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(folder))
    model.to_empty(device="cpu")
    model.tie_weights()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    model.save_pretrained(folder)
    return folder
