"""The shipped folder, the training encoding and transformers agree with each other."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoConfig, AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from examples.plates.architecture import config, image_processor
from examples.plates.asks import Answer, Turn
from examples.plates.batches import (
    BURST,
    PATCH_UNIT,
    TEXT_UNIT,
    BatchTeam,
    Diet,
    batches,
    collate,
)
from examples.plates.draw import draw, marks
from examples.plates.encode import IGNORED, ConversationCode, Encoder
from examples.plates.forward import merged, normalised, tower
from examples.plates.hints import guidance_loss
from examples.plates.questions import Conversation, conversation, messages
from examples.plates.specs import plate_spec, shapes_spec
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
        ours = merged(visual, tower(visual, batch))[torch.from_numpy(batch.token_order)]
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


def test_answers_look_at_the_digits_they_say(words: Tokenizer) -> None:
    rng = random.Random(3)
    pictures = tuple(plate_spec(rng, number) for number in (1984, 57))
    turn = Answer().spell(57, 1).to("what is the number in picture 2?", "number of nth picture")
    code = Encoder(words).encode(Conversation((replace(turn, pictures=pictures),)))
    rows, columns = code.pictures[1].grid
    tokens = np.flatnonzero(code.ids == words.token_to_id(PAD))[-rows * columns // 4 :]
    wanted = []
    for mark in marks(pictures[1]):
        row, column = int(mark.centre[1] * rows / 2), int(mark.centre[0] * columns / 2)
        wanted.append(tokens[row * columns // 2 + column])
    learned = np.flatnonzero(code.targets != IGNORED)
    assert code.gaze.looks.tolist() == list(
        map(list, zip(learned.tolist(), [*wanted, wanted[-1]], strict=True))
    )


def test_a_number_asked_for_looks_at_the_pictures_it_fits(words: Tokenizer) -> None:
    rng = random.Random(4)
    pictures = tuple(plate_spec(rng, number) for number in (58, 57))
    turn = Turn("which picture shows 57?", "picture 2", "which picture", pictures)
    code = Encoder(words).encode(Conversation((turn,)))
    five, seven = (int(np.flatnonzero(code.ids == words.token_to_id(d))[-1]) for d in "57")
    starts = np.flatnonzero(code.ids == words.token_to_id("<|vision_start|>"))
    looked = [(at, int(np.searchsorted(starts, token))) for at, token in code.gaze.looks.tolist()]
    assert looked == [(five, 1), (five, 2), (seven, 2)]
    learned = set(np.flatnonzero(code.targets != IGNORED).tolist())
    assert {at for at, _ in code.gaze.reads.tolist()} == learned
    assert {five, seven} < {digit for _, digit in code.gaze.reads.tolist()}


def test_guidance_is_the_weight_on_the_right_tokens() -> None:
    attention = nn.Module()
    attention.scaling = 1.0
    attention.guided = torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8)
    pairs = np.array([[0, 3, 0], [0, 3, 2], [0, 1, 1]])
    loss = guidance_loss(attention, pairs)
    assert loss.item() == pytest.approx(math.log(2))
    assert guidance_loss(attention, pairs[:0]).item() == 0


def test_even_guidance_is_zero_for_equal_weights_on_the_right_tokens_alone() -> None:
    attention = nn.Module()
    attention.scaling = 1.0
    keys = torch.tensor([9.0, -9.0, 9.0, -9.0])[None, None, :, None].expand(1, 2, 4, 8)
    attention.guided = torch.ones(1, 2, 4, 8), keys
    assert guidance_loss(attention, np.array([[0, 3, 0], [0, 3, 2]]), evenly=True).item() < 1e-6
    half = guidance_loss(attention, np.array([[0, 3, 0]]), evenly=True)
    assert half.item() == pytest.approx(math.log(2), rel=1e-4)


def test_counts_look_at_each_thing_and_at_the_begin_of_its_picture(words: Tokenizer) -> None:
    rng = random.Random(5)
    spec = next(s for s in iter(lambda: shapes_spec(rng), None) if len(s.items) == 4)
    answer = Answer().count(1, tuple(range(4)))
    turn = replace(answer.to("how many?", "count"), pictures=(shapes_spec(rng), spec))
    code = Encoder(words).encode(Conversation((turn,)))
    starts = np.flatnonzero(code.ids == words.token_to_id("<|vision_start|>"))
    asked = np.flatnonzero(code.targets != IGNORED)[0]
    marked = starts[1] + 1 + np.unique(code.pictures[1].marks)
    assert code.gaze.tallies.tolist() == [[asked, token] for token in (starts[1], *marked)]


def test_batches_come_in_few_shapes(words: Tokenizer) -> None:
    diet = Diet(5, 8, 4, batch_tokens=2000, bare_share=0.3)
    drawn = list(islice(batches(words, diet), 12))
    assert {len(batch.patches) % PATCH_UNIT for batch in drawn} == {0}
    for batch in drawn:
        filled = len(batch.patches) > len(batch.hints)
        assert sum(runs for runs, _ in batch.pictures.groups) == batch.num_pictures + filled
    spoken = [batch.text.ids.shape for batch in drawn if batch.text.ids.size]
    assert 0 < len(spoken) < len(drawn)
    assert all(rows == 2000 // tokens and tokens % TEXT_UNIT == 0 for rows, tokens in spoken)


def test_a_team_draws_what_one_process_would(words: Tokenizer) -> None:
    diet = Diet(6, 1, 1, batch_tokens=100, bare_share=1.0)
    team = BatchTeam(words, diet, processes=1)
    try:
        drawn = [team.next() for _ in range(BURST)]
    finally:
        team.close()
    wanted = [batch.patches.tobytes() for batch in islice(batches(words, diet), BURST)]
    assert sorted(batch.patches.tobytes() for batch in drawn) == sorted(wanted)
