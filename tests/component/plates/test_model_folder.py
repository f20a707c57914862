"""The shipped folder, the training encoding and transformers agree with each other."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from examples.plates.architecture import config, image_processor
from examples.plates.batches import collate
from examples.plates.draw import draw
from examples.plates.encode import IGNORED, ConversationCode, Encoder
from examples.plates.forward import merged, normalised, tower
from examples.plates.questions import Conversation, conversation, drill, messages
from shared.demo import model_dir

PAD = "<|image_pad|>"


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return Tokenizer.from_file(str(model_dir() / "tokenizer.json"))


@pytest.fixture(scope="module")
def chats() -> list[Conversation]:
    rng = random.Random(11)
    return [conversation(rng, max_turns=3, held_out=None) for _ in range(12)]


@pytest.fixture(scope="module")
def codes(words: Tokenizer, chats: list[Conversation]) -> list[ConversationCode]:
    return [Encoder(words).encode(chat) for chat in chats]


def test_config_of_the_folder_is_the_architecture(words: Tokenizer) -> None:
    stored = AutoConfig.from_pretrained(model_dir()).to_dict()
    built = config(words).to_dict()
    for key in ("text_config", "vision_config", "image_token_id", "tie_word_embeddings"):
        assert stored[key] == built[key]


def test_training_ids_are_the_chat_template_s(
    chats: list[Conversation], codes: list[ConversationCode]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir())
    for chat, code in zip(chats, codes, strict=True):
        pieces = tokenizer.apply_chat_template(
            messages(chat, open_last=False), tokenize=False
        ).split(PAD)
        for index, picture in enumerate(code.pictures):
            pieces[index] += PAD * (picture.grid[0] * picture.grid[1] // 4)
        assert tokenizer("".join(pieces))["input_ids"] == code.ids.tolist()


def test_targets_spell_the_answers(
    words: Tokenizer, chats: list[Conversation], codes: list[ConversationCode]
) -> None:
    for chat, code in zip(chats, codes, strict=True):
        learned = code.targets[code.targets != IGNORED].tolist()
        text = words.decode(learned, skip_special_tokens=False)
        assert text == "".join(f"{turn.answer}<|im_end|>" for turn in chat.turns)


def test_pixels_are_the_image_processor_s(
    chats: list[Conversation], codes: list[ConversationCode]
) -> None:
    processor = image_processor()
    for chat, code in zip(chats, codes, strict=True):
        for spec, picture in zip(chat.specs, code.pictures, strict=True):
            wanted = processor(images=[draw(spec)], return_tensors="np")
            assert tuple(wanted["image_grid_thw"][0, 1:]) == picture.grid
            one_frame = wanted["pixel_values"].reshape(len(picture.patches), 3, 2, -1)[:, :, 0]
            ours = normalised(torch.from_numpy(picture.patches)).numpy()
            np.testing.assert_allclose(ours, one_frame.reshape(ours.shape), atol=2e-6)


def test_positions_are_transformers_m_rope(words: Tokenizer, codes: list[ConversationCode]) -> None:
    settings = config(words)
    with torch.device("meta"):
        model = Qwen2_5_VLModel(settings)
    for code in codes:
        ids = torch.from_numpy(code.ids)[None]
        kinds = (ids == settings.image_token_id).int()
        grids = [(1, *picture.grid) for picture in code.pictures]
        thw = torch.tensor(grids) if grids else None
        positions, _ = model.get_rope_index(ids, kinds, image_grid_thw=thw)
        np.testing.assert_array_equal(positions[:, 0].numpy(), code.positions)


def test_batched_vision_equals_transformers(
    chats: list[Conversation], codes: list[ConversationCode]
) -> None:
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(model_dir(), dtype=torch.float32)
    visual = model.model.visual
    pixels = image_processor()(
        images=[draw(spec) for chat in chats for spec in chat.specs], return_tensors="pt"
    )
    with torch.inference_mode():
        wanted = visual(pixels["pixel_values"], pixels["image_grid_thw"]).pooler_output
        batch = collate(codes, pad_id=0)
        ours = merged(visual, tower(visual, batch), batch)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


def test_tallies_stand_at_the_counted_things_and_are_the_answers(words: Tokenizer) -> None:
    rng = random.Random(3)
    noted = 0
    for _ in range(40):
        chat = drill(rng, max_turns=4, max_pictures=3)
        code = Encoder(words).encode(chat)
        places = np.flatnonzero(code.tallies[:, 0])
        asked = [turn for turn in chat.turns if turn.things is not None]
        assert len(places) == len(asked)
        for at, turn in zip(places, asked, strict=True):
            assert turn.things is not None
            assert turn.things.words.endswith(words.decode([int(code.ids[at])]).strip())
            counts = [turn.things.count(spec) for spec in chat.specs]
            assert code.tallies[at].tolist() == [1 + n for n in counts] + [0] * (4 - len(counts))
            assert int(turn.answer) in counts
            noted += 1
    assert noted > 40
