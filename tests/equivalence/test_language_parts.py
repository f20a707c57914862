"""Language parts of vision-language families against transformers, with embeddings put in.

Interleaved three-axis positions, DeepStack, experts stacked in the checkpoint, and pictures whose
tokens see each other.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.model import norm
from shared.model.positions import media_spans
from tests.support.engine import Engine, Running
from tests.support.language_parts import (
    LANGUAGE_PARTS,
    EmbeddedPrompt,
    LanguageReference,
    build_language_part,
    embedded_prompt,
)

TOLERANCE = 1e-10
# In patches before 2 x 2 merging: none, thin, several, larger than a sliding window.
PICTURES: tuple[tuple[tuple[int, int], ...], ...] = (
    (),
    ((6, 2),),
    ((2, 2), (10, 6)),
    ((4, 12), (2, 6), (8, 8)),
)
Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Family name -> folder with `whole` and `language`, built once."""
    folders: dict[str, Path] = {}

    def build(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            build_language_part(name, folders[name])
        return folders[name]

    return build


def prompts_for(name: str) -> list[EmbeddedPrompt]:
    return [embedded_prompt(name, sizes, seed=i) for i, sizes in enumerate(PICTURES)]


def start(engine: Engine, reference: LanguageReference, prompt: EmbeddedPrompt) -> Running:
    positions, next_pos = reference.positions(prompt)
    rows = prompt.embeddings if prompt.grids else None
    return engine.start_embedded(prompt.token_ids, positions, next_pos, prompt.media_index, rows)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert theirs.std() > 1.0, "logits of the test model are not spread"
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize("name", LANGUAGE_PARTS)
def test_logits_alone_packed_and_decoding(name: str, folder_of: Folders) -> None:
    engine = Engine(folder_of(name) / "language", "float64")
    reference = LanguageReference(name, folder_of(name), torch.float64, exact=True)
    prompts = prompts_for(name)
    expected = [reference.generate(prompt, 6) for prompt in prompts]
    running = [start(engine, reference, prompt) for prompt in prompts]
    packed = engine.step(running, all_positions=True)
    rows = list(packed.split([len(prompt.token_ids) for prompt in prompts]))
    for step in range(5):
        for one, (tokens, _) in zip(running, expected, strict=True):
            engine.append(one, tokens[step])
        for i, row in enumerate(engine.step(running)):
            rows[i] = torch.cat((rows[i], row[None]))
    for ours, (_, logits) in zip(rows, expected, strict=True):
        assert difference(ours, logits) <= TOLERANCE
    for prompt, (_, logits) in zip(prompts, expected, strict=True):
        alone = engine.step([start(engine, reference, prompt)], all_positions=True)
        assert difference(alone, logits[: len(alone)]) <= TOLERANCE


@pytest.mark.parametrize("name", LANGUAGE_PARTS)
def test_chunks_that_leave_pictures_whole(name: str, folder_of: Folders) -> None:
    """Cuts right before and behind each picture, and through pictures where nothing forbids it."""
    engine = Engine(folder_of(name) / "language", "float64")
    reference = LanguageReference(name, folder_of(name), torch.float64, exact=True)
    for prompt in prompts_for(name):
        num_tokens = len(prompt.token_ids)
        cuts = {cut for span in media_spans(prompt.media_index) for cut in span}
        if not engine.spec.text.bidirectional_media:
            cuts |= set(range(4, num_tokens, 4))
        bounds = sorted({0, num_tokens, *cuts})
        running = start(engine, reference, prompt)
        chunks = [
            engine.step([running], max_new_tokens=stop - begin, all_positions=True)
            for begin, stop in pairwise(bounds)
        ]
        _, logits = reference.generate(prompt, 1)
        assert difference(torch.cat(chunks), logits) <= TOLERANCE


@pytest.mark.parametrize("name", LANGUAGE_PARTS)
def test_logits_of_unmodified_transformers(
    name: str, folder_of: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same claim with our norms and routers rounded to float32, as transformers rounds them."""
    monkeypatch.setattr(norm, "accumulation_dtype", lambda dtype: torch.float32)
    engine = Engine(folder_of(name) / "language", "float64")
    reference = LanguageReference(name, folder_of(name), torch.float64, exact=False)
    for prompt in prompts_for(name):
        ours = engine.step([start(engine, reference, prompt)], all_positions=True)
        assert difference(ours, reference.generate(prompt, 1)[1]) <= TOLERANCE


@pytest.mark.parametrize("name", LANGUAGE_PARTS)
def test_greedy_tokens_in_float32(name: str, folder_of: Folders) -> None:
    engine = Engine(folder_of(name) / "language", "float32")
    reference = LanguageReference(name, folder_of(name), torch.float32, exact=False)
    for prompt in prompts_for(name)[1:3]:
        expected, _ = reference.generate(prompt, 64)
        assert engine.greedy(start(engine, reference, prompt), 64) == expected


def test_experts_load_from_every_layout(folder_of: Folders, tmp_path: Path) -> None:
    """Stacked, stacked and transposed, and expert by expert: the same logits."""
    source = folder_of("qwen3_vl_moe") / "language"
    stacked = load_file(source / "model.safetensors")
    layouts = {"stacked": stacked, "transposed": {}, "separate": {}}
    for name, tensor in stacked.items():
        is_expert = ".experts." in name
        layouts["transposed"][name] = tensor.mT.contiguous() if is_expert else tensor
        layouts["separate"] |= _separate(name, tensor) if is_expert else {name: tensor}
    token_ids = [5, 9, 3, 77]
    logits = []
    for layout, tensors in layouts.items():
        folder = tmp_path / layout
        folder.mkdir()
        (folder / "config.json").write_bytes((source / "config.json").read_bytes())
        save_file(tensors, folder / "model.safetensors")
        engine = Engine(folder, "float32")
        batch = engine.pack([_text_only(engine, token_ids)])
        logits.append(engine.model.forward(batch, engine.kv))
    assert len({name for tensors in layouts.values() for name in tensors}) > len(stacked)
    assert all(torch.equal(logits[0], other) for other in logits[1:])


def _separate(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    prefix, _, kind = name.rpartition(".experts.")
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[kind]
    return {
        f"{prefix}.experts.{i}.{part}.weight": weight.contiguous()
        for i, matrix in enumerate(tensor)
        for part, weight in zip(parts, matrix.chunk(len(parts)), strict=True)
    }


def _text_only(engine: Engine, token_ids: list[int]) -> Running:
    ids, positions = np.array(token_ids), np.arange(len(token_ids))
    return engine.start_embedded(ids, positions, len(ids), ids[:0], None)


def test_a_cut_picture_is_refused(folder_of: Folders) -> None:
    engine = Engine(folder_of("gemma3") / "language", "float64")
    reference = LanguageReference("gemma3", folder_of("gemma3"), torch.float64, exact=True)
    running = start(engine, reference, prompts_for("gemma3")[2])
    (first, _) = running.bidirectional_spans[1]
    with pytest.raises(
        ValueError, match=f"bidirectional span {first}.* is cut at token {first + 2}"
    ):
        engine.step([running], max_new_tokens=first + 2)
    running.bidirectional_spans = ()
    with pytest.raises(ValueError, match="needs bidirectional_spans"):
        engine.step([running])
