"""Attention of whole prompts and slices over pages: against float64, and bit by bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest
import torch

from shared.cache.geometry import KvGeometry
from shared.cache.kv_cache import KvCache
from shared.model.attention import SdpaAttention
from shared.model.batch import ForwardBatch, SequenceInput
from shared.model.cpu_attention import CpuAttention
from shared.model.kernels.choice import has_compiled_kernels, has_paired_kernels
from shared.model.prompt_attention import PromptPlan, prompt_kernel

if TYPE_CHECKING:
    from shared.model.kernels.machine_code import Kernel

prompts = pytest.importorskip("shared.model.kernels.prompts")

pytestmark = pytest.mark.skipif(
    not has_compiled_kernels(), reason="needs numba and a CPU with fused multiply-add"
)

NUM_BLOCKS = 80
# New tokens and those before them: on both sides of a block of queries and a group of keys.
SEQUENCES = ((1, 0), (1, 99), (5, 3), (100, 0), (47, 49), (17, 200), (16, 0), (130, 1))


def cache(dtype: str, *, head_dim: int, block_size: int = 16) -> KvCache:
    blocks = NUM_BLOCKS * 16 // block_size
    kv = KvCache(KvGeometry(2, 2, head_dim, block_size, dtype), blocks)
    kv.data.copy_(torch.randn(kv.data.shape, generator=torch.Generator().manual_seed(0)))
    return kv


def sequences(kv: KvCache, sizes: Sequence[tuple[int, int]]) -> list[SequenceInput]:
    """Blocks dealt out in a scattered order."""
    free = torch.randperm(kv.num_blocks, generator=torch.Generator().manual_seed(1)).tolist()
    result = []
    for new, cached in sizes:
        count = -(-(new + cached) // kv.block_size)
        blocks, free = free[:count], free[count:]
        result.append(SequenceInput([1] * new, range(cached, cached + new), blocks, cached))
    return result


def queries(kv: KvCache, num_tokens: int, num_heads: int) -> torch.Tensor:
    """A slice of a wider tensor, as projections leave it."""
    generator = torch.Generator().manual_seed(2)
    wide = torch.randn(num_tokens, num_heads + 3, kv.geometry.head_dim, generator=generator)
    return wide.to(kv.data.dtype)[:, :num_heads]


def attend(
    kv: KvCache,
    batch: ForwardBatch,
    q: torch.Tensor,
    window: int | None = None,
    kernel: Kernel | None = None,
) -> torch.Tensor:
    plan = CpuAttention().plan(batch, kv, (None, window))
    assert isinstance(plan, PromptPlan)
    if kernel is not None:
        plan = PromptPlan(batch, kv, (None, window), kernel)
    keys, values = kv.layer_slots(1)
    slots = batch.slot_mapping
    return plan.attend(1, q, keys[slots], values[slots], kv)


def exact(
    kv: KvCache, batch: ForwardBatch, q: torch.Tensor, window: int | None = None
) -> torch.Tensor:
    geometry = kv.geometry
    wide = KvCache(KvGeometry(2, 2, geometry.head_dim, kv.block_size, "float64"), kv.num_blocks)
    wide.data.copy_(kv.data)
    keys, values = wide.layer_slots(1)
    slots = batch.slot_mapping
    plan = SdpaAttention().plan(batch, wide, (None, window))
    return plan.attend(1, q.double(), keys[slots], values[slots], wide)


@pytest.mark.parametrize("window", [None, 1, 20, 150])
@pytest.mark.parametrize(("group", "head_dim"), [(1, 8), (2, 64), (7, 72), (20, 128)])
def test_prompts_agree_with_float64(group: int, head_dim: int, window: int | None) -> None:
    kv = cache("float32", head_dim=head_dim)
    batch = ForwardBatch.pack(sequences(kv, SEQUENCES), kv.block_size)
    q = queries(kv, batch.num_tokens, 2 * group)
    got = attend(kv, batch, q, window)
    assert float((got - exact(kv, batch, q, window)).abs().max()) < 5e-6


@pytest.mark.parametrize("block_size", [1, 5, 16, 64])
def test_blocks_of_any_size_are_read(block_size: int) -> None:
    kv = cache("float32", head_dim=64, block_size=block_size)
    batch = ForwardBatch.pack(sequences(kv, SEQUENCES), block_size)
    q = queries(kv, batch.num_tokens, 4)
    assert float((attend(kv, batch, q) - exact(kv, batch, q)).abs().max()) < 5e-6


def test_spans_that_see_themselves_whole() -> None:
    kv = cache("float32", head_dim=64)
    spans = ((3, 60), (70, 71), (90, 100))
    (plain,) = sequences(kv, [(100, 0)])
    batch = ForwardBatch.pack(
        [
            SequenceInput(
                plain.token_ids, plain.positions, plain.block_ids, bidirectional_spans=spans
            )
        ],
        kv.block_size,
    )
    assert batch.attend_stops is not None
    q = queries(kv, batch.num_tokens, 4)
    for window in (None, 30):
        expected = exact(kv, batch, q, window)
        assert float((attend(kv, batch, q, window) - expected).abs().max()) < 5e-6


def test_bfloat16_is_right_to_one_rounding() -> None:
    kv = cache("bfloat16", head_dim=64)
    batch = ForwardBatch.pack(sequences(kv, SEQUENCES), kv.block_size)
    q = queries(kv, batch.num_tokens, 14)
    got = attend(kv, batch, q, kernel=prompts.attend_prompts_bf16)
    expected = exact(kv, batch, q)
    assert got.dtype == torch.bfloat16
    assert bool(((got - expected).abs() <= expected.abs() * 2.0**-8 + 1e-5).all())


@pytest.mark.skipif(not has_paired_kernels(), reason="needs AVX-512 bfloat16 instructions")
@pytest.mark.parametrize("window", [None, 1, 20, 150])
@pytest.mark.parametrize(("group", "head_dim"), [(1, 16), (2, 64), (7, 80), (20, 128)])
def test_pairs_are_right_to_a_rounding_of_each_weight(
    group: int, head_dim: int, window: int | None
) -> None:
    kv = cache("bfloat16", head_dim=head_dim)
    assert prompt_kernel(kv.geometry) is prompts.attend_prompts_pairs
    batch = ForwardBatch.pack(sequences(kv, SEQUENCES), kv.block_size)
    q = queries(kv, batch.num_tokens, 2 * group)
    got, expected = attend(kv, batch, q, window), exact(kv, batch, q, window)
    # A weight and their sum are each off by 2 ** -9 at most, the result by as much once more.
    kv.layer_slots(1)[1].abs_()
    bound = 2.0**-8 * exact(kv, batch, q, window) + 2.0**-8 * expected.abs() + 1e-5
    assert bool(((got - expected).abs() <= bound).all())


@pytest.mark.skipif(not has_paired_kernels(), reason="needs AVX-512 bfloat16 instructions")
def test_heads_whose_pairs_fill_no_vectors_are_computed_otherwise() -> None:
    geometry = cache("bfloat16", head_dim=72).geometry
    assert prompt_kernel(geometry) is prompts.attend_prompts_bf16


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("window", [None, 20])
def test_a_token_depends_neither_on_the_batch_nor_on_the_steps(
    dtype: str, window: int | None
) -> None:
    """Each sequence alone, and in two steps, to the last bit."""
    kv = cache(dtype, head_dim=64)
    inputs = sequences(kv, SEQUENCES)
    batch = ForwardBatch.pack(inputs, kv.block_size)
    q = queries(kv, batch.num_tokens, 14)
    together = attend(kv, batch, q, window)
    start = 0
    for (new, cached), each in zip(SEQUENCES, inputs, strict=True):
        cut = new // 3
        for first, stop in ((0, new), (0, cut), (cut, new)):
            if stop - first < 2:
                continue  # a step of single tokens is another kernel's
            part = SequenceInput(
                [1] * (stop - first),
                range(cached + first, cached + stop),
                each.block_ids,
                cached + first,
            )
            rows = slice(start + first, start + stop)
            alone = attend(kv, ForwardBatch.pack([part], kv.block_size), q[rows], window)
            assert torch.equal(alone, together[rows])
        start += new


def test_threads_give_the_same_result() -> None:
    kv = cache("bfloat16", head_dim=64)
    batch = ForwardBatch.pack(sequences(kv, SEQUENCES), kv.block_size)
    q = queries(kv, batch.num_tokens, 14)
    expected, before = attend(kv, batch, q), torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for _ in range(5):
                assert torch.equal(attend(kv, batch, q), expected)
    finally:
        torch.set_num_threads(before)


def test_a_sequence_that_is_not_a_number_leaves_others_alone() -> None:
    kv = cache("bfloat16", head_dim=64)
    inputs = sequences(kv, [(20, 0), (20, 0)])
    batch = ForwardBatch.pack(inputs, kv.block_size)
    q = queries(kv, batch.num_tokens, 14)
    before = attend(kv, batch, q)
    keys, _ = kv.layer_slots(1)
    keys[batch.slot_mapping[25]] = float("nan")
    after = attend(kv, batch, q)
    assert torch.equal(after[:20], before[:20])
    assert bool(after[25:].isnan().all())


def test_a_row_that_mixes_with_decoding() -> None:
    """Single tokens beside a prompt: more heads than rows, so heads lie side by side."""
    kv = cache("float32", head_dim=64)
    batch = ForwardBatch.pack(sequences(kv, [(1, 150), (40, 10), (1, 7), (2, 0)]), kv.block_size)
    for num_heads in (2, 14, 40):
        q = queries(kv, batch.num_tokens, num_heads)
        assert float((attend(kv, batch, q) - exact(kv, batch, q)).abs().max()) < 5e-6
