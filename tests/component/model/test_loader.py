"""Role-only loading from real safetensors files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from shared.errors import ModelLoadError, SettingsError, UnsupportedModel
from shared.model.loader import load_language_model, load_tower
from shared.modelspec import ModelSpec
from shared.runtime.model_dir import find_model_dir
from tests.support.models import FAMILIES, VISION_FAMILIES, build_tiny_model
from tests.support.tensors import tensors_of

ModelDirs = Callable[[str], Path]


def rewrite(source: Path, target: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """The same model with other tensors in one file."""
    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()}, target / "model.safetensors"
    )
    return target


def is_vision(name: str) -> bool:
    return "visual" in name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_language_part_holds_exactly_the_language_tensors(
    family: str, model_dir_of: ModelDirs
) -> None:
    folder = model_dir_of(family)
    progress: list[tuple[int, int]] = []
    model = load_language_model(
        folder, on_progress=lambda done, total: progress.append((done, total))
    )
    stored = {name: t for name, t in tensors_of(folder).items() if not is_vision(name)}
    if model.spec.tie_word_embeddings:
        stored.pop("lm_head.weight", None)
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    assert num_bytes == sum(tensor.nbytes for tensor in stored.values())
    assert progress[-1] == (num_bytes, num_bytes)
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
    assert not [name for name, _ in model.named_parameters() if is_vision(name)]
    assert not list(model.buffers())
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_the_tower_holds_exactly_the_vision_tensors(family: str, model_dir_of: ModelDirs) -> None:
    folder = model_dir_of(family)
    tower = load_tower(folder)
    stored = {name: t for name, t in tensors_of(folder).items() if is_vision(name)}
    parameters = dict(tower.module.named_parameters())
    assert sum(p.nbytes for p in parameters.values()) == sum(t.nbytes for t in stored.values())
    assert len(parameters) == len(stored)
    assert not [name for name in parameters if "embed_tokens" in name or "lm_head" in name]
    tensors = [*tower.module.parameters(), *tower.module.buffers()]
    assert not any(tensor.is_meta for tensor in tensors)


@pytest.mark.parametrize(
    ("language", "vision"),
    [
        ("model.language_model.", "model.visual."),
        ("language_model.model.", "visual."),
        ("model.", "visual."),
    ],
)
def test_every_naming_of_a_checkpoint_loads(
    language: str, vision: str, model_dir_of: ModelDirs, tmp_path: Path
) -> None:
    source = model_dir_of("qwen2_vl")
    spec = ModelSpec.load(source)
    renamed = {}
    for name, tensor in tensors_of(source).items():
        place = spec.family.classify(name)
        assert place is not None
        head = "language_model." if language.startswith("language_model") else ""
        prefix = vision if place[0] == "tower" else language
        renamed[(head if place[1] == "lm_head.weight" else prefix) + place[1]] = tensor
    folder = rewrite(source, tmp_path / "renamed", renamed)
    for mine, theirs in (
        (load_language_model(folder), load_language_model(source)),
        (load_tower(folder).module, load_tower(source).module),
    ):
        expected = dict(theirs.named_parameters())
        assert all(torch.equal(p, expected[name]) for name, p in mine.named_parameters())


def test_shards_and_index(tmp_path: Path) -> None:
    folder = build_tiny_model("qwen2_5_vl", tmp_path, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    model = load_language_model(folder)
    stored = tensors_of(folder)
    name = next(name for name in stored if name.endswith("layers.2.mlp.up_proj.weight"))
    assert torch.equal(model.checkpoint_views()["layers.2.mlp.up_proj.weight"], stored[name])
    load_tower(folder)


def test_another_dtype_is_cast_while_loading(model_dir_of: ModelDirs) -> None:
    model = load_language_model(model_dir_of("qwen2"), dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("problem", ["missing", "unexpected", "shape", "foreign"])
def test_wrong_tensors_are_named(problem: str, model_dir_of: ModelDirs, tmp_path: Path) -> None:
    source = model_dir_of("llama")
    tensors = tensors_of(source)
    match problem:
        case "missing":
            del tensors["model.layers.1.mlp.up_proj.weight"]
            message = r"language part, 1 missing: layers\.1\.mlp\.up_proj\.weight"
        case "unexpected":
            tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(1)
            message = r"language part, 1 unexpected: layers\.9\.mlp\.up_proj\.weight"
        case "shape":
            tensors["model.norm.weight"] = torch.zeros(33)
            message = r"norm\.weight: the checkpoint has shape \[33\], the config needs \[32\]"
        case _:
            tensors["audio.conv.weight"] = torch.zeros(1)
            message = r"audio\.conv\.weight belongs to no part of llama"
    folder = rewrite(source, tmp_path / "wrong", tensors)
    with pytest.raises(ModelLoadError, match=message):
        load_language_model(folder)


def test_old_rotary_buffers_are_ignored(model_dir_of: ModelDirs, tmp_path: Path) -> None:
    tensors = tensors_of(model_dir_of("llama"))
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    load_language_model(rewrite(model_dir_of("llama"), tmp_path / "old", tensors))


def test_broken_and_absent_files(model_dir_of: ModelDirs, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((model_dir_of("llama") / "config.json").read_bytes())
    with pytest.raises(ModelLoadError, match="neither"):
        load_language_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(ModelLoadError, match="not a readable safetensors file"):
        load_language_model(tmp_path)


def test_an_index_that_names_a_missing_shard(model_dir_of: ModelDirs, tmp_path: Path) -> None:
    source = model_dir_of("llama")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    with safe_open(source / "model.safetensors", framework="pt") as file:
        weight_map = dict.fromkeys(file.keys(), "model-00001-of-00001.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelLoadError, match="model-00001-of-00001"):
        load_language_model(tmp_path)


def test_text_models_have_no_tower(model_dir_of: ModelDirs) -> None:
    with pytest.raises(UnsupportedModel, match="'qwen3' has neither vision nor audio tower"):
        load_tower(model_dir_of("qwen3"))


def test_resolving_a_model(tmp_path: Path) -> None:
    assert find_model_dir(str(tmp_path)) == tmp_path
    with pytest.raises(SettingsError, match="--model = .*neither a folder nor a hub id"):
        find_model_dir(str(tmp_path / "absent"))
    with pytest.raises(ModelLoadError, match="could not be fetched"):
        find_model_dir("nobody/no-such-model")


def test_prefill_and_decode_never_import_transformers(model_dir_of: ModelDirs) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from shared.model.loader import load_language_model\n"
        "load_language_model(Path(sys.argv[1]))\n"
        "assert 'transformers' not in sys.modules\n"
        "import shared.model.sampler, shared.model.positions\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(model_dir_of("qwen2_vl"))], check=True)


def test_a_spec_needs_no_torch(model_dir_of: ModelDirs) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from shared.modelspec import ModelSpec\n"
        "import shared.cache.block_pool, shared.cache.geometry, shared.model.positions\n"
        "ModelSpec.load(Path(sys.argv[1]))\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code, str(model_dir_of("qwen2_vl"))], check=True)
