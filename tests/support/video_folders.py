"""Tiny Qwen2-VL and Qwen2.5-VL folders whose template knows videos, and clips to send.

In: a family's name and a folder. Out: the folder as on the hub; a clip's file of noise.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import transformers

from shared.media.content_key import content_key
from shared.media.picture import PictureLimits, open_picture
from shared.media.video import VideoLimits, container_of, probe_video
from shared.modelspec import ModelSpec
from shared.text.chat_template import ChatTemplate
from shared.text.prompt import ChatMessage, Medium, Prompt, PromptBuilder
from shared.text.tokenizer import TextTokenizer
from tests.support.folders import built_once
from tests.support.models import build_tiny_model, quiet, spread_weights
from tests.support.tiny_tokenizer import TOKEN_IDS, VOCAB_SIZE, tiny_tokenizer

VIDEO_FAMILIES = ("qwen2_vl", "qwen2_5_vl")
_SETTINGS = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": 4,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 256, "longest_edge": 1024},
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5, 0.6, 0.7],
}
_MARKS = "<|vision_start|><|{}_pad|><|vision_end|>"
_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}" + _MARKS.format("image") + "{% elif c['type'] == 'video' %}"
    "" + _MARKS.format("video") + "{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}</s>\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def build_video_folder(name: str, folder: Path) -> Path:
    """Weights, tokenizer, template and settings."""
    build_tiny_model(name, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = VOCAB_SIZE
    for kind in ("image", "video"):
        config[f"{kind}_token_id"] = TOKEN_IDS[f"<|{kind}_pad|>"]
    for end in ("start", "end"):
        config[f"vision_{end}_token_id"] = TOKEN_IDS[f"<|vision_{end}|>"]
    (folder / "config.json").write_text(json.dumps(config))
    with quiet():
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(
            transformers.AutoConfig.from_pretrained(folder), dtype=torch.float32
        )
        spread_weights(model, 0)
        model.save_pretrained(folder)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    (folder / "preprocessor_config.json").write_text(json.dumps(_SETTINGS))
    (folder / "chat_template.jinja").write_text(_TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def video_dir_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family name -> its folder, built once a session."""
    return built_once(build_video_folder, tmp_path_factory)


def clip_file(
    num_frames: int = 20,
    *,
    rate: int = 10,
    size: tuple[int, int] = (32, 48),
    container: str = "mp4",
    codec: str = "mpeg4",
    seed: int = 0,
) -> bytes:
    """A clip of noise; `size` is height and width."""
    rng = np.random.default_rng(seed)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        for _ in range(num_frames):
            noise = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        output.mux(stream.encode())
    return buffer.getvalue()


def media_prompt(folder: Path, parts: Sequence[str | bytes]) -> Prompt:
    """One user turn of texts, picture files and clips, as a gateway builds it."""
    spec, tokenizer = ModelSpec.load(folder), TextTokenizer.load(folder)
    assert spec.vision is not None
    builder = PromptBuilder(
        tokenizer,
        ChatTemplate.load(folder),
        spec.vision.image_token_id,
        video_token_id=spec.vision.video_token_id,
    )
    content = tuple(_measured(part, spec) if isinstance(part, bytes) else part for part in parts)
    return builder.build([ChatMessage("user", content)])


def _measured(data: bytes, spec: ModelSpec) -> Medium:
    assert spec.vision is not None
    sha256 = hashlib.sha256(data).hexdigest()
    key = content_key(sha256, spec.fingerprint, spec.preprocessor_hash)
    if container_of(data):
        assert spec.vision.clips is not None
        layout = spec.vision.clips.measure(probe_video(data, VideoLimits()))
        return Medium.of_clip(sha256, key, layout)
    picture = open_picture(data, PictureLimits())
    return Medium.of(sha256, key, spec.vision.sizing.measure(picture.height, picture.width))
