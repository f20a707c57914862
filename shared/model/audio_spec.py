"""What a model folder says about sound, read once and checked.

In: a model folder and its config. Out: a frozen `AudioSpec`, and `UnsupportedModel` for what the
encoder would not do exactly. Neither torch nor transformers is imported, so the gateway can use it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import UnsupportedModel
from shared.media.sizing.sound import STRIDE, SoundSizing
from shared.model.config_fields import Config, expect, parse_config, read_optional_bytes, required

# What transformers' config and feature extractor say where the files are silent.
_DEFAULT_TOKEN_ID = 151_646
_DEFAULT_MEL_BINS = 128
_DEFAULT_POSITIONS = 1500
_EXTRACTOR: dict[str, Any] = {
    "feature_size": 80,
    "sampling_rate": 16_000,
    "hop_length": 160,
    "chunk_length": 30,
}
# What the extractor must not do: noise would make two encoders disagree, other padding another
# count; 0 is what Whisper's log scale was trained on.
_ONLY: dict[str, Any] = {
    "feature_extractor_type": "WhisperFeatureExtractor",
    "dither": 0.0,
    "padding_side": "right",
    "padding_value": 0.0,
}


@dataclass(frozen=True, slots=True)
class AudioSpec:
    """Shape of the audio tower's inputs, and the token id that stands for sound.

    `max_positions` is what the tower's learned positions reach to.
    """

    num_mel_bins: int
    max_positions: int
    audio_token_id: int
    sizing: SoundSizing

    @classmethod
    def load(cls, model_dir: Path, config: Config) -> AudioSpec:
        """Read and check; `UnsupportedModel` says which field stands in the way."""
        audio: Config = required(config, "audio_config")
        expect(audio, "model_type", "qwen2_audio_encoder")
        # The head is a tensor of its own in this family, whatever the configs say.
        expect(config, "tie_word_embeddings", False)
        expect(config.get("text_config") or {}, "tie_word_embeddings", False)
        token_id = config.get("audio_token_index", config.get("audio_token_id"))
        num_mel_bins = int(audio.get("num_mel_bins", _DEFAULT_MEL_BINS))
        max_positions = int(audio.get("max_source_positions", _DEFAULT_POSITIONS))
        return cls(
            num_mel_bins=num_mel_bins,
            max_positions=max_positions,
            audio_token_id=_DEFAULT_TOKEN_ID if token_id is None else int(token_id),
            sizing=_sizing(_extractor_settings(model_dir), num_mel_bins, max_positions),
        )


def _extractor_settings(model_dir: Path) -> Config:
    """In the order in which transformers looks for them."""
    processor_path = model_dir / "processor_config.json"
    processor = parse_config(read_optional_bytes(processor_path), processor_path)
    path = model_dir / "preprocessor_config.json"
    own = parse_config(read_optional_bytes(path), path)
    nested = processor.get("feature_extractor")
    given = nested if isinstance(nested, dict) and nested else own
    if not given:
        raise UnsupportedModel(
            f"{model_dir}: neither processor_config.json nor preprocessor_config.json describes a "
            "feature extractor"
        )
    return {**_EXTRACTOR, **given}


def _sizing(settings: Config, num_mel_bins: int, max_positions: int) -> SoundSizing:
    """The rule, where extractor and tower agree on bins and frames."""
    for field, supported in _ONLY.items():
        expect(settings, field, supported)
    rate_hz, hop = int(settings["sampling_rate"]), int(settings["hop_length"])
    max_samples = int(settings["chunk_length"]) * rate_hz
    if settings["feature_size"] != num_mel_bins:
        raise UnsupportedModel(
            f"feature extractor feature_size={settings['feature_size']!r}, "
            f"audio_config.num_mel_bins is {num_mel_bins}"
        )
    if max_samples != max_positions * STRIDE * hop:
        raise UnsupportedModel(
            f"feature extractor chunk_length={settings['chunk_length']!r} gives "
            f"{max_samples / hop:g} spectra of hop_length={hop}, "
            f"audio_config.max_source_positions={max_positions} needs {max_positions * STRIDE}"
        )
    return SoundSizing(rate_hz, hop, max_samples)
