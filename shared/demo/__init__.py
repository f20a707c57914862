"""The demo model that comes with the package: a small trained Qwen2.5-VL that reads plates and
counts shapes."""

from __future__ import annotations

from pathlib import Path


def model_dir() -> Path:
    """The folder with config, weights, tokenizer, chat template and image processor settings, as on
    a model hub."""
    return Path(__file__).parent / "model"
