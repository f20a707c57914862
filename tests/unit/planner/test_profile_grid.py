"""The steps that are measured stay within memory and model, and tell every coefficient apart."""

from __future__ import annotations

import numpy as np
import pytest

from services.planner.profiling.grid import Room, decode_steps, picture_batches, prompt_steps

ROOMS = [
    Room(max_tokens=4096, max_context_tokens=4096, num_blocks=2048, block_size=16),
    Room(max_tokens=256, max_context_tokens=512, num_blocks=64, block_size=16),
    Room(max_tokens=10_000, max_context_tokens=128, num_blocks=100_000, block_size=1),
]


@pytest.mark.parametrize("room", ROOMS)
def test_every_step_fits(room: Room) -> None:
    for lengths in prompt_steps(room):
        assert sum(lengths) <= room.max_tokens
        assert max(lengths) <= room.max_context_tokens
        assert sum(map(room.num_blocks_of, lengths)) <= room.num_blocks
    for lengths in decode_steps(room):
        assert max(lengths) < room.max_context_tokens
        assert sum(room.num_blocks_of(length + 1) for length in lengths) <= room.num_blocks


@pytest.mark.parametrize("room", ROOMS)
def test_no_feature_is_a_mixture_of_the_others(room: Room) -> None:
    prompts = [(1, sum(ls), sum(n * n for n in ls)) for ls in prompt_steps(room)]
    contexts = [(1, sum(ls), len(ls)) for ls in decode_steps(room)]
    for rows in (prompts, contexts):
        scaled = np.array(rows, dtype=float) / np.max(rows, axis=0)
        assert np.linalg.matrix_rank(scaled) == 3


def test_pictures_are_batched_up_to_the_limit_and_one_always_goes_alone() -> None:
    steps = list(picture_batches((16, 5000), max_patches=64))
    assert steps == [(0, 1), (0, 2), (0, 4), (1, 1)]
