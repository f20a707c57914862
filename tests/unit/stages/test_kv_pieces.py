"""Into which pieces KV is divided, and what of a prompt's progress lets each travel."""

from __future__ import annotations

import asyncio
import random
from itertools import pairwise

import pytest
from pydantic import ValidationError

from services.prefill.pieces import MAX_GROUPS, MAX_RANGES, PiecePlan
from services.prefill.progress import PrefillProgress
from shared.cache.geometry import KvGeometry
from shared.errors import Outcome, TransferError
from shared.messages.descriptor import WorkerRef
from shared.messages.refs import KvRef, TensorRef, pieces_of

GEOMETRY = KvGeometry(num_layers=6, num_kv_heads=2, head_dim=8, block_size=16, dtype="float32")


def test_whole_is_one_piece() -> None:
    plan = PiecePlan("whole", GEOMETRY, 32, min_piece_bytes=1)
    assert (plan.token_cuts(100, 16), plan.layer_cuts(100, 16)) == ((), ())


def test_per_chunk_begins_a_piece_behind_the_cached_tokens_and_with_each_chunk() -> None:
    plan = PiecePlan("per-chunk", GEOMETRY, 40, min_piece_bytes=1)
    assert plan.token_cuts(100, 16) == (16, 48, 80)
    assert plan.token_cuts(100, 0) == (32, 64, 96)
    assert plan.layer_cuts(100, 0) == ()


def test_layer_wise_divides_layers_too_but_not_into_crumbs() -> None:
    assert PiecePlan("layer-wise", GEOMETRY, min_piece_bytes=1).layer_cuts(100, 0) == tuple(
        range(1, 6)
    )
    two_layers = 2 * 100 * GEOMETRY.bytes_per_token_layer
    plan = PiecePlan("layer-wise", GEOMETRY, min_piece_bytes=two_layers)
    assert plan.layer_cuts(100, 0) == (2, 4)
    assert plan.token_cuts(100, 0) == ()
    assert plan.layer_cuts(10, 0) == ()


def test_what_is_small_is_not_divided() -> None:
    bytes_of_ten = 10 * GEOMETRY.bytes_per_token
    layer_wise = PiecePlan("layer-wise", GEOMETRY, min_piece_bytes=bytes_of_ten)
    assert not layer_wise.is_divided(10)
    assert layer_wise.is_divided(40)
    assert not PiecePlan("whole", GEOMETRY, min_piece_bytes=1).is_divided(40)
    assert not PiecePlan("per-chunk", GEOMETRY, min_piece_bytes=1).is_divided(40)
    assert PiecePlan("per-chunk", GEOMETRY, 16, min_piece_bytes=1).is_divided(40)


def test_pieces_cover_everything_once_and_are_bounded_in_number() -> None:
    rng = random.Random(1)
    for _ in range(500):
        layers = rng.randint(1, 80)
        geometry = KvGeometry(layers, 2, 8, rng.choice([1, 16]), "float32")
        plan = PiecePlan(
            rng.choice(["per-chunk", "layer-wise"]),
            geometry,
            rng.choice([0, 1, 5, 64, 1000]),
            min_piece_bytes=rng.choice([1, 1000, 10**6]),
        )
        num_tokens = rng.randint(1, 5000)
        num_cached = rng.randrange(num_tokens) // geometry.block_size * geometry.block_size
        token_cuts = plan.token_cuts(num_tokens, num_cached)
        layer_cuts = plan.layer_cuts(num_tokens, num_cached)
        assert len(token_cuts) < MAX_RANGES + 1
        assert len(layer_cuts) < MAX_GROUPS
        for cuts, end in ((token_cuts, num_tokens), (layer_cuts, layers)):
            assert all(low < high for low, high in pairwise((0, *cuts, end)))
        pieces = pieces_of(num_tokens, layers, token_cuts, layer_cuts)
        area = sum(each.num_tokens * (each.last_layer - each.first_layer) for each in pieces)
        assert area == num_tokens * layers


@pytest.mark.parametrize(
    "changes",
    [
        {"token_cuts": (5, 5)},
        {"token_cuts": (10,)},
        {"layer_cuts": (2,)},
        {"token_cuts": (4,), "kv_len": (10, 9)},
        {"token_cuts": (2, 4)},
    ],
)
def test_cuts_that_do_not_fit_are_refused(changes: dict[str, tuple[int, ...]]) -> None:
    tensor = TensorRef(
        owner=WorkerRef(name="p", incarnation=1),
        address=b"",
        lease_id="kv",
        compatibility="",
        segment_bytes=(1,),
    )
    with pytest.raises(ValidationError):
        KvRef(**{"tensor": tensor, "kv_len": (10, 10), "next_pos": 1, **changes})


async def test_progress_lets_a_piece_go_when_its_layers_are_done() -> None:
    progress = PrefillProgress()
    waits = {
        (tokens, layers): asyncio.create_task(progress.until(tokens, layers))
        for tokens in (4, 8)
        for layers in (1, 2)
    }

    async def done() -> set[tuple[int, int]]:
        for _ in range(5):
            await asyncio.sleep(0)
        return {key for key, wait in waits.items() if wait.done()}

    assert await done() == set()
    progress.computing(4, 1)
    assert await done() == {(4, 1)}
    progress.computed(4)
    assert await done() == {(4, 1), (4, 2)}
    progress.computing(8, 1)
    assert await done() == {(4, 1), (4, 2), (8, 1)}
    first = asyncio.create_task(progress.first_token())
    progress.end()
    for never in (waits[8, 2], first):
        with pytest.raises(TransferError) as failure:
            await never
        assert failure.value.outcome is Outcome.CANCELLED
