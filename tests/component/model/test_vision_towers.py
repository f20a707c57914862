"""Towers and projectors of the vision families, loaded alone, against transformers' whole model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from services.encoder.preprocess import PicturePreprocessor
from shared.errors import ModelLoadError
from shared.media.picture import PictureLimits
from shared.model.loader import load_language_model, load_tower
from shared.modelspec import ModelSpec
from tests.support.models import quiet
from tests.support.tensors import tensors_of
from tests.support.vision_families import VISION_FAMILY_NAMES
from tests.support.vision_folders import (
    build_vision_folder,
    hf_inputs,
    hf_processor,
    our_prompt,
    picture_file,
)

FolderOf = Callable[[str], Path]
LANGUAGE = re.compile(r"language_model\.|text_model\.|^lm_head\.")
CHAT: list[str | bytes] = [
    picture_file(20, 33),
    picture_file(70, 9, 1),
    picture_file(5, 5, 2),
    picture_file(61, 47, 3),
]


def image_features(name: str, folder: Path, inputs: Any) -> torch.Tensor:
    """transformers' rows for all pictures, with DeepStack's features behind them."""
    with quiet():
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
    names = ("pixel_values", "image_sizes", "image_grid_thw", "pixel_attention_mask")
    with torch.no_grad():
        output = model.model.get_image_features(
            **{key: inputs[key] for key in names if key in inputs}
        )
    rows = torch.cat(list(output.pooler_output)).reshape(-1, 32)
    deepstack = getattr(output, "deepstack_features", None) or []
    return torch.cat((rows, *(torch.cat(list(layer)) for layer in deepstack)), dim=-1)


@pytest.mark.parametrize("name", VISION_FAMILY_NAMES)
def test_rows_equal_transformers_and_fill_the_placeholders(
    name: str, vision_dir_of: FolderOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = vision_dir_of(name)
    preprocess = PicturePreprocessor(folder, PictureLimits())
    pictures = [preprocess(part) for part in CHAT if isinstance(part, bytes)]
    rows = load_tower(folder).encode(pictures)
    spec = ModelSpec.load(folder)
    assert [tuple(each.shape) for each in rows] == [
        (item.num_tokens, spec.embedding_width) for item in our_prompt(folder, CHAT).media
    ]
    expected = image_features(name, folder, hf_inputs(hf_processor(folder, monkeypatch), CHAT))
    torch.testing.assert_close(torch.cat(rows), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", VISION_FAMILY_NAMES)
def test_packed_pictures_equal_single_ones(name: str, vision_dir_of: FolderOf) -> None:
    folder = vision_dir_of(name)
    tower = load_tower(folder, dtype="float64")
    preprocess = PicturePreprocessor(folder, PictureLimits())
    pictures = [preprocess(part) for part in CHAT if isinstance(part, bytes)]
    for picture, packed in zip(pictures, tower.encode(pictures), strict=True):
        assert picture.num_patches >= 1
        assert float((tower.encode([picture])[0] - packed).abs().max()) <= 1e-10


@pytest.mark.parametrize("name", VISION_FAMILY_NAMES)
def test_each_part_holds_exactly_its_tensors(name: str, vision_dir_of: FolderOf) -> None:
    folder = vision_dir_of(name)
    stored = tensors_of(folder)
    vision = {key: tensor for key, tensor in stored.items() if not LANGUAGE.search(key)}
    tower = load_tower(folder)
    parameters = dict(tower.module.named_parameters())
    assert len(parameters) == len(vision)
    assert sum(p.nbytes for p in parameters.values()) == sum(t.nbytes for t in vision.values())
    assert not any(t.is_meta for t in (*tower.module.parameters(), *tower.module.buffers()))
    assert not [key for key in parameters if "embed_tokens" in key or "lm_head" in key]
    language = load_language_model(folder)
    num_bytes = sum(parameter.nbytes for parameter in language.parameters())
    assert num_bytes == sum(t.nbytes for key, t in stored.items() if key not in vision)


@pytest.mark.parametrize("name", ["llava_next", "smolvlm", "qwen3_vl"])
def test_a_part_opens_only_its_shards(name: str, tmp_path: Path) -> None:
    """Shards without a vision tensor may be missing from an encoder's disk, and the reverse."""
    folder = build_vision_folder(name, tmp_path / "model", max_shard_size="15KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shards = {
        part: {file for key, file in index.items() if bool(LANGUAGE.search(key)) == part}
        for part in (True, False)
    }
    assert shards[True] - shards[False]
    assert shards[False] - shards[True]
    for file in shards[True] - shards[False]:
        (folder / file).rename(tmp_path / file)
    load_tower(folder)
    with pytest.raises(ModelLoadError):
        load_language_model(folder)
    for file in shards[True] - shards[False]:
        (tmp_path / file).rename(folder / file)
    for file in shards[False] - shards[True]:
        (folder / file).unlink()
    load_language_model(folder)


RENAMINGS: dict[str, dict[str, str]] = {
    # As transformers 4 wrote them, with and without the newer `model.` level.
    "llava": {r"^vision_tower\.": "vision_tower.vision_model."},
    "llava_next": {
        r"^vision_tower\.": "model.vision_tower.vision_model.",
        r"^multi_modal_projector\.": "model.multi_modal_projector.",
        r"^image_newline": "model.image_newline",
        r"^language_model\.model\.": "model.language_model.",
        r"^language_model\.lm_head\.": "lm_head.",
    },
    "gemma3": {r"^vision_tower\.": "vision_tower.vision_model."},
    "internvl": {
        r"^vision_tower\.": "model.vision_tower.",
        r"^multi_modal_projector\.": "model.multi_modal_projector.",
        r"^language_model\.model\.": "model.language_model.",
        r"^language_model\.lm_head\.": "lm_head.",
    },
    "qwen3_vl": {r"^model\.visual\.": "visual.", r"^model\.language_model\.": "model."},
}


@pytest.mark.parametrize("name", RENAMINGS)
def test_every_naming_of_a_checkpoint_loads(
    name: str, vision_dir_of: FolderOf, tmp_path: Path
) -> None:
    source = vision_dir_of(name)
    renamed = {}
    for key, tensor in tensors_of(source).items():
        for pattern, replacement in RENAMINGS[name].items():
            key = re.sub(pattern, replacement, key)
        renamed[key] = tensor.clone()
    renamed["vision_tower.vision_model.embeddings.position_ids"] = torch.zeros(1, 17)
    save_file(renamed, tmp_path / "model.safetensors")
    for file in ("config.json", "preprocessor_config.json"):
        (tmp_path / file).write_bytes((source / file).read_bytes())
    expected = dict(load_tower(source).module.named_parameters())
    for key, parameter in load_tower(tmp_path).module.named_parameters():
        assert torch.equal(parameter, expected[key])
    load_language_model(tmp_path)
