"""Videos of Qwen2-VL and Qwen2.5-VL against transformers' whole model: logits and tokens.

Our side is the gateway's prompt, the encoder's preprocessing and tower, and the decoder; the other
side gets the pixels and computes rows, positions, logits and tokens by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from services.encoder.preprocess import PicturePreprocessor
from shared.media.picture import PictureLimits
from shared.media.video import VideoLimits, probe_video
from shared.model.towers.pixels import Pixels
from shared.modelspec import ModelSpec
from tests.support.engine import Engine, Running
from tests.support.exact_reference import greedy_tokens, make_exact
from tests.support.models import load_reference
from tests.support.video_folders import VIDEO_FAMILIES, clip_file, media_prompt
from tests.support.vision_folders import picture_file

TOLERANCE = 1e-10
NUM_TOKENS = 32
CHATS: dict[str, list[str | bytes]] = {
    "one clip": ["see ", clip_file(20), " and say"],
    # 24 of 77 frames: the seconds of a step are no round number.
    "odd rate": [clip_file(77, rate=7, size=(50, 34), seed=1), "what?"],
    "mixed, in order": [
        picture_file(21, 37),
        "then ",
        clip_file(11, rate=3, size=(16, 90), seed=2),
        picture_file(40, 20, 1),
        clip_file(2, seed=3),
        "which?",
    ],
}


def pixels_of(folder: Path, chat: list[str | bytes]) -> list[Pixels]:
    preprocess = PicturePreprocessor(folder, PictureLimits())
    return [preprocess(part) for part in chat if isinstance(part, bytes)]


def start(engine: Engine, folder: Path, chat: list[str | bytes]) -> Running:
    prompt = media_prompt(folder, chat)
    return engine.begin(prompt.token_ids, prompt.media, pixels_of(folder, chat))


def reference_inputs(folder: Path, chat: list[str | bytes]) -> dict[str, Any]:
    """What transformers' processor returns, for ids that were compared elsewhere."""
    vision = ModelSpec.load(folder).vision
    assert vision is not None
    assert vision.clips is not None
    ids = torch.tensor([media_prompt(folder, chat).token_ids])
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == vision.image_token_id).int()
        + 2 * (ids == vision.video_token_id).int(),
    }
    kinds: dict[str, list[Pixels]] = {"image": [], "video": []}
    seconds = []
    files = [part for part in chat if isinstance(part, bytes)]
    for file, pixels in zip(files, pixels_of(folder, chat), strict=True):
        is_clip = not file.startswith(b"\x89PNG")
        kinds["video" if is_clip else "image"].append(pixels)
        if is_clip:
            facts = probe_video(file, VideoLimits())
            sampled = vision.clips.num_sampled(facts)
            seconds.append(2 / (sampled / facts.num_frames * facts.fps))
    for kind, suffix in (("image", ""), ("video", "_videos")):
        if kinds[kind]:
            inputs[f"pixel_values{suffix}"] = torch.cat([each.values for each in kinds[kind]])
            grids = torch.tensor([each.grid_thw for each in kinds[kind]])
            inputs[f"{kind}_grid_thw"] = grids
    if "qwen2_5" in str(ModelSpec.load(folder).model_type):
        inputs["second_per_grid_ts"] = torch.tensor(seconds)
    return inputs


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_logits_and_greedy_tokens(name: str, video_dir_of: Callable[[str], Path]) -> None:
    folder = video_dir_of(name)
    model = load_reference(name, folder, torch.float64)
    make_exact(model)
    engine = Engine(folder, "float64", num_blocks=1024)
    expected = []
    for chat in CHATS.values():
        with torch.no_grad():
            logits = model(**reference_inputs(folder, chat)).logits[0]
        assert logits.std() > 1.0, "logits of the test model are not spread"
        expected.append(logits)
        ours = engine.step([start(engine, folder, chat)], all_positions=True)
        assert float((ours - logits).abs().max()) <= TOLERANCE

    running = [start(engine, folder, chat) for chat in CHATS.values()]
    packed = engine.step(running, all_positions=True)
    assert float((packed - torch.cat(expected)).abs().max()) <= TOLERANCE

    for chat in CHATS.values():
        inputs = reference_inputs(folder, chat)
        theirs = greedy_tokens(model, inputs, NUM_TOKENS)
        assert engine.greedy(start(engine, folder, chat), NUM_TOKENS) == theirs
