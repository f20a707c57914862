"""A tiny Qwen2-Audio folder, transformers' processor for it, and sounds to send.

In: a folder. Out: the folder as on the hub, with a tower for three seconds; files of noise.
"""

from __future__ import annotations

import hashlib
import io
import json
import wave
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import transformers

from shared.media.audio import AudioLimits, Samples, read_audio
from shared.media.content_key import content_key
from shared.modelspec import ModelSpec
from shared.text.chat_template import ChatTemplate
from shared.text.prompt import ChatMessage, Medium, Prompt, PromptBuilder
from shared.text.tokenizer import TextTokenizer
from tests.support.folders import built_once
from tests.support.models import quiet, spread_weights
from tests.support.text_configs import TEXT
from tests.support.tiny_tokenizer import VOCAB_SIZE, tiny_tokenizer

RATE_HZ = 16_000
MAX_SECONDS = 3
MARKS = ("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")
AUDIO_TOKEN_ID = VOCAB_SIZE + 1
_EXTRACTOR = {
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 20,
    "chunk_length": MAX_SECONDS,
    "hop_length": 160,
    "n_fft": 400,
    "sampling_rate": RATE_HZ,
    "padding_side": "right",
    "padding_value": 0.0,
    "return_attention_mask": True,
}
_TEMPLATE = (
    "{% set heard = namespace(count=0) %}"
    "{% for m in messages %}{{ m['role'] }}: "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'audio' %}{% set heard.count = heard.count + 1 %}"
    "Sound {{ heard.count }}: <|audio_bos|><|AUDIO|><|audio_eos|>\n"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def audio_config() -> Any:
    """A tower of two layers over 20 bins and 150 positions."""
    return transformers.Qwen2AudioConfig(
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": 20,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 48,
            "d_model": 24,
            "max_source_positions": 50 * MAX_SECONDS,
        },
        text_config={**TEXT, "model_type": "qwen2", "vocab_size": VOCAB_SIZE + len(MARKS)},
        audio_token_index=AUDIO_TOKEN_ID,
    )


def build_audio_folder(
    name: str, folder: Path, *, seed: int = 0, max_shard_size: str = "50GB"
) -> Path:
    """Weights, tokenizer, template and settings; `name` is for `built_once` only."""
    with quiet():
        torch.manual_seed(seed)
        model = transformers.Qwen2AudioForConditionalGeneration(audio_config())
        spread_weights(model, seed)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer(MARKS).save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    (folder / "preprocessor_config.json").write_text(json.dumps(_EXTRACTOR))
    (folder / "chat_template.jinja").write_text(_TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def audio_dir_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`"qwen2_audio"` -> its folder, built once a session."""
    return built_once(build_audio_folder, tmp_path_factory)


def load_audio_reference(folder: Path, dtype: torch.dtype) -> Any:
    """transformers' own model."""
    with quiet():
        return transformers.Qwen2AudioForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa"
        ).eval()


def wave_values(num_samples: int, seed: int = 0, num_channels: int = 1) -> np.ndarray:
    """Noise that swells, `[num_samples, num_channels]` int16."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(-20_000, 20_000, (num_samples, num_channels))
    swell = np.abs(np.sin(np.linspace(0, 7 + seed, num_samples)))[:, None]
    return (noise * swell).astype("<i2")


def wav_file(
    num_samples: int, seed: int = 0, *, rate_hz: int = RATE_HZ, num_channels: int = 1
) -> bytes:
    """A WAV of 16 bits."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(num_channels)
        file.setsampwidth(2)
        file.setframerate(rate_hz)
        file.writeframes(wave_values(num_samples, seed, num_channels).tobytes())
    return buffer.getvalue()


def encoded_file(
    container: str, codec: str, num_samples: int, seed: int = 0, *, rate_hz: int = RATE_HZ
) -> bytes:
    """The same noise in another container and codec, one channel."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream: Any = output.add_stream(codec, rate=rate_hz, layout="mono")
        values = wave_values(num_samples, seed).T
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(values), "s16", "mono")
        frame.sample_rate = rate_hz
        resampler = av.AudioResampler(
            stream.codec_context.format, "mono", rate_hz, stream.codec_context.frame_size or 1024
        )
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            output.mux(stream.encode(part))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def samples_of(data: bytes) -> Samples:
    """What gateway and encoder decode."""
    return read_audio(data, RATE_HZ, AudioLimits())


def audio_prompt(folder: Path, parts: Sequence[str | bytes]) -> Prompt:
    """One user turn of texts and sounds, as a gateway builds it."""
    spec = ModelSpec.load(folder)
    assert spec.audio is not None
    builder = PromptBuilder(
        TextTokenizer.load(folder),
        ChatTemplate.load(folder),
        None,
        audio_token_id=spec.audio.audio_token_id,
    )
    content = tuple(_measured(part, spec) if isinstance(part, bytes) else part for part in parts)
    return builder.build([ChatMessage("user", content)])


def hf_audio_processor(folder: Path) -> Any:
    """transformers' processor."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    template = (folder / "chat_template.jinja").read_text()
    return transformers.Qwen2AudioProcessor(extractor, tokenizer, chat_template=template)


def hf_audio_inputs(folder: Path, parts: Sequence[str | bytes]) -> Any:
    """The same turn as transformers' processor prepares it, from the same samples."""
    processor = hf_audio_processor(folder)
    content = [
        {"type": "audio"} if isinstance(part, bytes) else {"type": "text", "text": part}
        for part in parts
    ]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    sounds = [samples_of(part) for part in parts if isinstance(part, bytes)]
    return processor(text=[text], audio=sounds or None, sampling_rate=RATE_HZ, return_tensors="pt")


def _measured(data: bytes, spec: ModelSpec) -> Medium:
    assert spec.audio is not None
    sha256 = hashlib.sha256(data).hexdigest()
    key = content_key(sha256, spec.fingerprint, spec.preprocessor_hash)
    return Medium.of_sound(sha256, key, spec.audio.sizing.measure(len(samples_of(data))))
