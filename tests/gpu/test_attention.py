"""Paged attention against float64: ragged lengths, groups of heads, head sizes, blocks, windows."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from shared.model.attention import AttentionPlan
from shared.model.gpu.attention import TritonAttention
from shared.model.gpu.prefill_attention import PrefillTile
from tests.support.paged_attention import (
    TOLERANCES,
    Heads,
    PagedStep,
    float64_attention,
    paged_step,
)

# (cached, new): whole prompts, chunks behind a prefix, decoding; around tile and block borders.
MIXED = [(0, 5), (33, 1), (20, 17), (3, 40)]
DECODE = [(0, 1), (31, 1), (70, 1)]
SMALL_TILE = PrefillTile(rows=64, keys=32, num_warps=4, num_stages=1)
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def backend(step: PagedStep) -> TritonAttention:
    """Small tiles and pieces, so that short sequences already need several."""
    return TritonAttention(step.heads.num_heads, prefill_tile=SMALL_TILE, split_tokens=32)


def attend(step: PagedStep, window: int | None = None) -> torch.Tensor:
    plan: AttentionPlan = backend(step).plan(step.batch, step.kv, [window])
    cached = step.kv.layer_slots(0)[:, step.batch.slot_mapping]
    return plan.attend(0, step.q, cached[0], cached[1], step.kv)


def largest_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    assert out.shape == expected.shape
    return float((out.double().cpu() - expected).abs().max())


@pytest.mark.parametrize(
    ("num_kv_heads", "group", "head_dim", "block_size", "window", "dtype"),
    [
        (2, 1, 64, 16, None, F32),
        (1, 2, 80, 16, None, BF16),
        (1, 4, 256, 32, 1, F32),
        (1, 7, 128, 16, 9, BF16),
        (1, 8, 64, 32, 1000, F16),
    ],
)
@pytest.mark.parametrize("lens", [MIXED, DECODE], ids=["mixed", "decode"])
def test_agrees_with_float64(
    lens: list[tuple[int, int]],
    num_kv_heads: int,
    group: int,
    head_dim: int,
    block_size: int,
    window: int | None,
    dtype: torch.dtype,
    device: str,
) -> None:
    heads = Heads(num_kv_heads, group, head_dim)
    step = paged_step(lens, heads, block_size=block_size, dtype=dtype, device=device)
    out = attend(step, window)
    assert out.dtype == dtype
    assert largest_error(out, float64_attention(step, window)) < TOLERANCES[dtype]


@pytest.mark.parametrize(("group", "head_dim"), [(1, 128), (7, 128), (4, 64), (8, 256), (2, 80)])
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("window", [None, 700])
def test_long_contexts_with_the_tiles_of_production(
    group: int, head_dim: int, dtype: torch.dtype, window: int | None, device: str
) -> None:
    if device == "cpu":
        pytest.skip("too slow under the interpreter")
    lens = [(0, 1300), (4000, 1), (777, 513), (9000, 1), (255, 1), (0, 2)]
    heads = Heads(4, group, head_dim)
    step = paged_step(lens, heads, block_size=16, dtype=dtype, device=device)
    plan = TritonAttention(heads.num_heads).plan(step.batch, step.kv, [window])
    out = plan.attend(0, step.q, step.k, step.k, step.kv)
    assert largest_error(out, float64_attention(step, window)) < TOLERANCES[dtype]


def test_a_decoding_sequence_gives_the_same_bits_alone_and_in_company(device: str) -> None:
    step = paged_step(MIXED, Heads(2, 2, 64), block_size=16, dtype=F32, device=device)
    together = attend(step)
    alone = attend(step.only(1))
    row = int(step.batch.cu_seqlens_q[1])
    assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("window", [None, 6])
def test_tokens_of_a_picture_see_each_other(window: int | None, device: str) -> None:
    lens = [(0, 40), (10, 30)]
    step = paged_step(lens, Heads(1, 2, 64), block_size=16, dtype=F32, device=device)
    position = torch.cat([torch.arange(cached, cached + new) for cached, new in lens])
    is_picture = (position >= 12) & (position < 31)
    stops = torch.where(is_picture, 31, position + 1).to(device)
    batch = dataclasses.replace(step.batch, attend_stops=stops)
    step = dataclasses.replace(step, batch=batch)
    out = attend(step, window)
    expected = float64_attention(step, window)
    assert largest_error(out, expected) < TOLERANCES[F32]


def test_windows_differ_from_layer_to_layer(device: str) -> None:
    step = paged_step(MIXED, Heads(1, 2, 64), block_size=16, dtype=F32, device=device)
    cached = step.kv.layer_slots(0)[:, step.batch.slot_mapping]
    # Both layers read the one layer that the cache has.
    step.kv._slots = step.kv._slots.expand(2, *step.kv._slots.shape[1:])
    plan = backend(step).plan(step.batch, step.kv, [None, 5])
    for layer, window in enumerate((None, 5)):
        out = plan.attend(layer, step.q, cached[0], cached[1], step.kv)
        assert largest_error(out, float64_attention(step, window)) < TOLERANCES[F32]


def test_more_query_heads_per_kv_head_than_rows_are_refused(device: str) -> None:
    step = paged_step([(0, 3)], Heads(1, 65, 64), block_size=16, dtype=F32, device=device)
    with pytest.raises(ValueError, match="65 query heads share a KV head, the limit is 64"):
        attend(step)
