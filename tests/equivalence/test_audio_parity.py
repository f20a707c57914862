"""Sounds of Qwen2-Audio against transformers' whole model: logits and tokens.

Our side is the gateway's prompt, the encoder's preprocessing and tower, and the decoder; the other
side gets the files' samples and computes spectra, rows, logits and tokens by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from services.encoder.sounds import SoundPreprocessor
from tests.support.audio_folders import (
    audio_prompt,
    encoded_file,
    hf_audio_inputs,
    load_audio_reference,
    wav_file,
)
from tests.support.engine import Engine, Running
from tests.support.exact_reference import greedy_tokens, make_exact

TOLERANCE = 1e-10
NUM_TOKENS = 64
CHATS: dict[str, list[str | bytes]] = {
    "one sound": ["hear ", wav_file(12_347), " and say"],
    # One token and two: transformers takes runs of one for a prompt of its older processor.
    "the shortest": [wav_file(321, 1), wav_file(1000, 2), "what?"],
    "the longest": [wav_file(48_000, 3), "and?"],
    "several of odd lengths": [
        encoded_file("flac", "flac", 7_777, 4),
        "then ",
        wav_file(31_991, 5, rate_hz=22_050, num_channels=2),
        encoded_file("mp3", "libmp3lame", 20_011, 6, rate_hz=44_100),
        "which?",
        wav_file(5_120, 7),
    ],
}


def start(engine: Engine, folder: Path, chat: list[str | bytes]) -> Running:
    preprocess = SoundPreprocessor(folder)
    prompt = audio_prompt(folder, chat)
    sounds = [preprocess(part) for part in chat if isinstance(part, bytes)]
    return engine.begin(prompt.token_ids, prompt.media, sounds)


def reference_logits(model: Any, folder: Path, chat: list[str | bytes]) -> torch.Tensor:
    inputs = hf_audio_inputs(folder, chat)
    assert inputs["input_ids"][0].tolist() == list(audio_prompt(folder, chat).token_ids)
    with torch.no_grad():
        logits: torch.Tensor = model(**inputs).logits[0]
    return logits


def test_logits_and_greedy_tokens(audio_dir_of: Callable[[str], Path]) -> None:
    folder = audio_dir_of("qwen2_audio")
    model = load_audio_reference(folder, torch.float64)
    make_exact(model)
    engine = Engine(folder, "float64", num_blocks=1024)
    expected = []
    for chat in CHATS.values():
        logits = reference_logits(model, folder, chat)
        assert logits.std() > 1.0, "logits of the test model are not spread"
        expected.append(logits)
        ours = engine.step([start(engine, folder, chat)], all_positions=True)
        assert float((ours - logits).abs().max()) <= TOLERANCE

    running = [start(engine, folder, chat) for chat in CHATS.values()]
    packed = engine.step(running, all_positions=True)
    assert float((packed - torch.cat(expected)).abs().max()) <= TOLERANCE

    chunked = start(engine, folder, CHATS["several of odd lengths"])
    while chunked.num_pending > 7:
        engine.step([chunked], max_new_tokens=7)
    last = engine.step([chunked])
    assert float((last - expected[-1][-1]).abs().max()) <= TOLERANCE

    for chat in CHATS.values():
        inputs = hf_audio_inputs(folder, chat)
        theirs = greedy_tokens(model, inputs, NUM_TOKENS)
        assert engine.greedy(start(engine, folder, chat), NUM_TOKENS) == theirs


def test_the_sound_decides(audio_dir_of: Callable[[str], Path]) -> None:
    """Other noise of the same length gives other logits, so the comparison sees the tower."""
    folder = audio_dir_of("qwen2_audio")
    engine = Engine(folder, "float64", num_blocks=256)
    one, other = (
        engine.step([start(engine, folder, [wav_file(9_000, seed), "what?"])]) for seed in (0, 1)
    )
    assert float((one - other).abs().max()) > 0.1
