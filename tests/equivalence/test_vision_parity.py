"""Vision-language families against transformers: from picture files and text to logits and tokens.

Our side is the gateway's prompt, the encoder's preprocessing and tower, and the decoder; the other
side is transformers' processor and whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from services.encoder.preprocess import PicturePreprocessor
from shared.media.picture import PictureLimits
from tests.support.engine import Engine, Running
from tests.support.exact_reference import greedy_tokens, make_exact
from tests.support.models import quiet
from tests.support.vision_families import VISION_FAMILY_NAMES
from tests.support.vision_folders import hf_inputs, hf_processor, our_prompt, picture_file

TOLERANCE = 1e-10
NUM_TOKENS = 64
FolderOf = Callable[[str], Path]

# Odd sizes: wide, narrow, smaller than a tile, several tiles.
CHATS: dict[str, list[str | bytes]] = {
    "text": ["what is this?"],
    "one picture": ["see ", picture_file(21, 37), " and say"],
    "three pictures": [
        picture_file(71, 9, 1),
        "then\n",
        picture_file(13, 11, 2),
        picture_file(45, 62, 3),
        "\nwhich one?",
    ],
}


@pytest.fixture
def setup(
    request: pytest.FixtureRequest, vision_dir_of: FolderOf, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Any, Any]:
    """Folder, transformers' processor and its model in float64."""
    folder = vision_dir_of(request.param)
    options = {"experts_implementation": "eager"} if "moe" in request.param else {}
    with quiet():
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float64, attn_implementation="sdpa", **options
        ).eval()
    make_exact(model)
    return folder, hf_processor(folder, monkeypatch), model


def start(engine: Engine, folder: Path, chat: list[str | bytes]) -> Running:
    prompt = our_prompt(folder, chat)
    preprocess = PicturePreprocessor(folder, PictureLimits())
    pictures = [preprocess(part) for part in chat if isinstance(part, bytes)]
    return engine.begin(prompt.token_ids, prompt.media, pictures)


@pytest.mark.parametrize("setup", VISION_FAMILY_NAMES, indirect=True)
def test_logits_and_greedy_tokens(setup: tuple[Path, Any, Any]) -> None:
    folder, processor, model = setup
    engine = Engine(folder, "float64", num_blocks=1024)
    expected = []
    for chat in CHATS.values():
        inputs = hf_inputs(processor, chat)
        with torch.no_grad():
            logits = model(**inputs).logits[0]
        assert logits.std() > 1.0, "logits of the test model are not spread"
        expected.append(logits)
        ours = engine.step([start(engine, folder, chat)], all_positions=True)
        assert float((ours - logits).abs().max()) <= TOLERANCE

    running = [start(engine, folder, chat) for chat in CHATS.values()]
    packed = engine.step(running, all_positions=True)
    assert float((packed - torch.cat(expected)).abs().max()) <= TOLERANCE

    chat = CHATS["three pictures"]
    inputs = hf_inputs(processor, chat)
    theirs = greedy_tokens(model, inputs, NUM_TOKENS)
    assert engine.greedy(start(engine, folder, chat), NUM_TOKENS) == theirs
