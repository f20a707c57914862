"""The audio side of model folders: what the hub has, and clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shared.errors import UnsupportedModel
from shared.media.kind import MediaKind
from shared.media.sizing.sound import SoundSizing
from shared.model.audio_spec import AudioSpec
from shared.modelspec import ModelSpec

# The fields that matter, as the hub has them for Qwen2-Audio.
CONFIG: dict[str, Any] = {
    "model_type": "qwen2_audio",
    "audio_config": {
        "model_type": "qwen2_audio_encoder",
        "num_mel_bins": 128,
        "max_source_positions": 1500,
        "d_model": 1280,
    },
    "text_config": {
        "model_type": "qwen2",
        "intermediate_size": 11_008,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "vocab_size": 156_032,
    },
    "audio_token_index": 151_646,
    "torch_dtype": "bfloat16",
}
EXTRACTOR: dict[str, Any] = {
    "feature_extractor_type": "WhisperFeatureExtractor",
    "chunk_length": 30,
    "feature_size": 128,
    "hop_length": 160,
    "n_fft": 400,
    "n_samples": 480_000,
    "nb_max_frames": 3000,
    "padding_side": "right",
    "padding_value": 0.0,
    "return_attention_mask": True,
    "sampling_rate": 16_000,
}


def load(folder: Path, *, extractor: dict[str, Any] | None = None, **changes: Any) -> ModelSpec:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    settings = json.dumps({**EXTRACTOR, **(extractor or {})})
    (folder / "preprocessor_config.json").write_text(settings)
    return ModelSpec.load(folder)


def test_the_hub_s_folder(tmp_path: Path) -> None:
    spec = load(tmp_path)
    assert spec.audio == AudioSpec(128, 1500, 151_646, SoundSizing(16_000, 160, 480_000))
    assert (spec.vision, spec.dtype) == (None, "bfloat16")
    assert spec.roles == ("encode", "prefill", "decode")
    assert spec.media_kinds == {MediaKind.AUDIO}
    text = spec.text
    assert (text.hidden_size, text.num_layers, text.vocab_size) == (4096, 32, 156_032)
    assert (text.qkv_bias, text.o_bias, text.tie_word_embeddings) == (True, False, False)
    assert spec.embedding_width == 4096


def test_defaults_of_transformers(tmp_path: Path) -> None:
    """A file that names only what differs: its token, bins and positions are the defaults."""
    without = {key: value for key, value in CONFIG.items() if key != "audio_token_index"}
    without["audio_config"] = {"model_type": "qwen2_audio_encoder"}
    without["text_config"] = {"rms_norm_eps": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps(without))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"feature_size": 128}))
    spec = ModelSpec.load(tmp_path)
    assert spec.audio == AudioSpec(128, 1500, 151_646, SoundSizing())
    assert spec.text.qkv_bias


def test_an_extractor_inside_the_processor_goes_first(tmp_path: Path) -> None:
    load(tmp_path)
    nested = {"feature_extractor": {**EXTRACTOR, "hop_length": 80, "chunk_length": 15}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    audio = ModelSpec.load(tmp_path).audio
    assert audio is not None
    assert audio.sizing == SoundSizing(16_000, 80, 240_000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"audio_config": None}, "no audio_config"),
        ({"audio_config": {"model_type": "whisper"}}, "model_type='whisper'.*qwen2_audio_encoder"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"text_config": {**CONFIG["text_config"], "tie_word_embeddings": True}}, "tie_word_embed"),
        ({"extractor": {"feature_size": 80}}, "feature_size=80, audio_config.num_mel_bins is 128"),
        ({"extractor": {"chunk_length": 20}}, "chunk_length=20 gives 2000 spectra.*1500 needs 300"),
        ({"extractor": {"hop_length": 161}}, "hop_length=161, audio_config.max_source_positions"),
        ({"extractor": {"dither": 0.1}}, "dither=0.1"),
        ({"extractor": {"padding_side": "left"}}, "padding_side='left'"),
        ({"extractor": {"padding_value": 1.0}}, "padding_value=1.0"),
        ({"extractor": {"feature_extractor_type": "ClapFeatureExtractor"}}, "ClapFeatureExtractor"),
    ],
)
def test_refusals(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        load(tmp_path, **changes)


def test_a_folder_without_an_extractor(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UnsupportedModel, match="describes a feature extractor"):
        ModelSpec.load(tmp_path)
