"""The engine against transformers: same logits to float64 rounding, same greedy tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.model import norm
from shared.model.mlp import GatedMlp
from tests.support.engine import Engine, Running
from tests.support.exact_reference import make_exact
from tests.support.models import (
    FAMILIES,
    IMAGE_TOKEN,
    VISION_FAMILIES,
    Prompt,
    load_reference,
    make_prompt,
)

TOLERANCE = 1e-10
ModelDirs = Callable[[str], Path]

# Odd grids (in patches, before 2 x 2 merging): thin, square and larger than a vision window.
PICTURES: tuple[tuple[tuple[int, int], ...], ...] = (
    (),
    ((6, 4),),
    ((2, 2), (10, 6)),
    ((4, 14), (2, 6), (8, 8)),
)


def prompts_for(family: str, engine: Engine) -> list[Prompt]:
    """Four prompts of different lengths; with 0 to 3 pictures where the family takes them."""
    has_vision = family in VISION_FAMILIES
    return [
        make_prompt(engine.spec, 7 + 6 * i, pictures if has_vision else (), seed=i)
        for i, pictures in enumerate(PICTURES)
    ]


class Reference:
    """transformers' model with its own cache, one prompt at a time."""

    def __init__(self, family: str, folder: Path, dtype: torch.dtype, *, exact: bool) -> None:
        self.model = load_reference(family, folder, dtype)
        if exact:
            make_exact(self.model)

    @torch.no_grad()
    def prefill(self, prompt: Prompt) -> Any:
        token_ids = torch.from_numpy(prompt.token_ids)[None]
        if prompt.pixel_values is None:
            return self.model(token_ids, use_cache=True)
        return self.model(
            token_ids,
            pixel_values=prompt.pixel_values,
            image_grid_thw=prompt.grid_thw,
            mm_token_type_ids=(token_ids == IMAGE_TOKEN).int(),
            use_cache=True,
        )

    @torch.no_grad()
    def generate(self, prompt: Prompt, num_tokens: int) -> tuple[list[int], torch.Tensor]:
        """Greedy tokens and the logits that chose them, `[num_tokens, vocab]`."""
        if hasattr(self.model.model, "rope_deltas"):
            self.model.model.rope_deltas = None  # left over from the prompt before
        output = self.prefill(prompt)
        tokens, logits = [], []
        for _ in range(num_tokens):
            logits.append(output.logits[0, -1])
            tokens.append(int(logits[-1].argmax()))
            output = self.model(
                torch.tensor([[tokens[-1]]]), past_key_values=output.past_key_values
            )
        return tokens, torch.stack(logits)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert theirs.std() > 1.0, "logits of the test model are not spread"
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_logits_alone_packed_and_chunked(family: str, model_dir_of: ModelDirs) -> None:
    engine = Engine(model_dir_of(family), "float64")
    reference = Reference(family, model_dir_of(family), torch.float64, exact=True)
    prompts = prompts_for(family, engine)
    expected = [reference.prefill(prompt).logits[0] for prompt in prompts]

    for prompt, logits in zip(prompts, expected, strict=True):
        alone = engine.step([engine.start(prompt)], all_positions=True)
        assert difference(alone, logits) <= TOLERANCE
    packed = engine.step([engine.start(prompt) for prompt in prompts], all_positions=True)
    assert difference(packed, torch.cat(expected)) <= TOLERANCE

    running = [engine.start(prompt) for prompt in prompts]
    chunks: list[list[torch.Tensor]] = [[] for _ in prompts]
    while pending := [i for i, one in enumerate(running) if one.num_pending]:
        sizes = [min(5, running[i].num_pending) for i in pending]
        logits = engine.step([running[i] for i in pending], max_new_tokens=5, all_positions=True)
        for i, chunk in zip(pending, torch.split(logits, sizes), strict=True):
            chunks[i].append(chunk)
    for parts, logits in zip(chunks, expected, strict=True):
        assert difference(torch.cat(parts), logits) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_gives_only_what_is_asked_for(
    family: str, model_dir_of: ModelDirs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed, and behind cached tokens: as good as the rows of a whole layer, with the same KV."""
    engine = Engine(model_dir_of(family), "float64")
    mlp = engine.model.layers[-1].mlp
    called = "in_parts" if isinstance(mlp, GatedMlp) else "forward"
    forward, num_rows = getattr(mlp, called), []

    def counted(hidden: torch.Tensor) -> torch.Tensor:
        num_rows.append(hidden.shape[0])
        result: torch.Tensor = forward(hidden)
        return result

    monkeypatch.setattr(mlp, called, counted)
    whole, expected_rows = in_slices(engine, prompts_for(family, engine), all_positions=True)
    assert num_rows == [sum(sizes) for sizes in expected_rows]
    num_rows.clear()
    last, _ = in_slices(engine, prompts_for(family, engine), all_positions=False)
    assert num_rows == [len(sizes) for sizes in expected_rows]
    for (logits, kv), (whole_logits, whole_kv) in zip(last, whole, strict=True):
        assert difference(logits, whole_logits) <= TOLERANCE
        assert all(torch.equal(a, b) for a, b in zip(kv, whole_kv, strict=True))


def in_slices(
    engine: Engine, prompts: list[Prompt], *, all_positions: bool
) -> tuple[list[tuple[torch.Tensor, list[torch.Tensor]]], list[list[int]]]:
    """Prefill of all prompts side by side, seven tokens a step. Of each step the logits of the last
    tokens, each prompt's first KV, and how many tokens each prompt brought."""
    engine.kv.data.zero_()
    running = [engine.start(prompt) for prompt in prompts]
    results, all_sizes = [], []
    while pending := [one for one in running if one.num_pending]:
        sizes = [min(7, one.num_pending) for one in pending]
        logits = engine.step(pending, max_new_tokens=7, all_positions=all_positions)
        if all_positions:
            logits = logits[torch.tensor(sizes).cumsum(0) - 1]
        results.append((logits, [engine.kv.gather(one.handle.block_ids, 7) for one in running]))
        all_sizes.append(sizes)
    for one in running:
        one.handle.free()
    return results, all_sizes


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_logits_of_unmodified_transformers(
    family: str, model_dir_of: ModelDirs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same claim with our norms rounded to float32, as transformers rounds them."""
    monkeypatch.setattr(norm, "accumulation_dtype", lambda dtype: torch.float32)
    engine = Engine(model_dir_of(family), "float64")
    reference = Reference(family, model_dir_of(family), torch.float64, exact=False)
    for prompt in prompts_for(family, engine):
        ours = engine.step([engine.start(prompt)], all_positions=True)
        assert difference(ours, reference.prefill(prompt).logits[0]) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_logits_in_a_shared_batch(family: str, model_dir_of: ModelDirs) -> None:
    """Sequences join one by one, so most steps mix a prefill with decodes at different lengths."""
    engine = Engine(model_dir_of(family), "float64")
    reference = Reference(family, model_dir_of(family), torch.float64, exact=True)
    prompts = prompts_for(family, engine)
    num_tokens = 8
    expected = [reference.generate(prompt, num_tokens) for prompt in prompts]

    running: list[Running] = []
    produced: list[list[torch.Tensor]] = [[] for _ in prompts]
    for step in range(num_tokens + len(prompts) - 1):
        if step < len(prompts):
            running.append(engine.start(prompts[step]))
        active = [i for i in range(len(running)) if len(produced[i]) < num_tokens]
        logits = engine.step([running[i] for i in active])
        for i, row in zip(active, logits, strict=True):
            engine.append(running[i], expected[i][0][len(produced[i])])
            produced[i].append(row)
    for rows, (_, logits) in zip(produced, expected, strict=True):
        assert difference(torch.stack(rows), logits) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_in_float32(family: str, model_dir_of: ModelDirs) -> None:
    engine = Engine(model_dir_of(family), "float32")
    reference = Reference(family, model_dir_of(family), torch.float32, exact=False)
    for prompt in prompts_for(family, engine)[1:3]:
        expected, _ = reference.generate(prompt, 64)
        assert engine.greedy(engine.start(prompt), 64) == expected


@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl"])
def test_tokens_survive_a_hand_over(family: str, model_dir_of: ModelDirs) -> None:
    """KV moves layer group by layer group into other blocks of another size and goes on there."""
    prefill = Engine(model_dir_of(family), "float32", block_size=4)
    decode = Engine(model_dir_of(family), "float32", block_size=8, num_blocks=32)
    prompt = prompts_for(family, prefill)[2]
    expected = prefill.greedy(prefill.start(prompt), 24)

    source = prefill.start(prompt)
    tokens = prefill.greedy(source, 10)
    decode.pool.allocate(3)  # shifts the block ids
    landing = decode.pool.allocate(decode.geometry.blocks_for(source.num_cached_tokens))
    for layers in (slice(0, 1), slice(1, 3)):
        values = prefill.kv.gather(source.handle.block_ids, source.num_cached_tokens, layers)
        assert values.is_contiguous()
        decode.kv.scatter(landing.block_ids, values, layers)
    source.handle.free()
    source.handle = landing
    missing = decode.geometry.blocks_for(len(source.token_ids)) - len(landing)
    landing.grow(missing)
    assert tokens + decode.greedy(source, 14) == expected


@pytest.mark.parametrize("family", ["llama", "qwen2_vl"])
def test_layers_in_pieces_are_bit_equal(family: str, model_dir_of: ModelDirs) -> None:
    engine = Engine(model_dir_of(family), "float32")
    running = [engine.start(prompt) for prompt in prompts_for(family, engine)]
    batch = engine.pack(running)
    whole = engine.model.forward(batch, engine.kv)
    blocks = [one.handle.block_ids for one in running]
    written = [engine.kv.gather(ids, 7) for ids in blocks]

    engine.kv.data.zero_()
    step = engine.model.begin(batch, engine.kv)
    hidden = engine.model.embed(batch)
    for layer in range(engine.spec.text.num_layers):
        hidden = engine.model.forward_layers(hidden, step, engine.kv, layer, layer + 1)
    assert torch.equal(engine.model.finish(hidden, step), whole)
    assert all(
        torch.equal(engine.kv.gather(ids, 7), kv) for ids, kv in zip(blocks, written, strict=True)
    )
