"""Attention over pages against PyTorch's on the same ragged batches."""

from __future__ import annotations

import pytest
import torch

from shared.cache.geometry import KvGeometry
from shared.cache.kv_cache import KvCache
from shared.model.attention import SdpaAttention, SdpaPlan
from shared.model.batch import ForwardBatch, SequenceInput
from shared.model.cpu_attention import CpuAttention, PagedPlan
from shared.model.kernels.choice import has_compiled_kernels
from tests.support.paged_attention import Heads, float64_attention, paged_step

needs_compiled = pytest.mark.skipif(
    not has_compiled_kernels(), reason="needs numba and a CPU with fused multiply-add"
)

CONTEXTS = (1, 2, 15, 16, 17, 40, 129, 333)
BLOCK_SIZE = 16


def cache(dtype: str, *, kv_heads: int, head_dim: int) -> KvCache:
    kv = KvCache(KvGeometry(2, kv_heads, head_dim, BLOCK_SIZE, dtype), 64)
    kv.data.copy_(torch.randn(kv.data.shape, generator=torch.Generator().manual_seed(0)))
    return kv


def decode_batch(contexts: tuple[int, ...]) -> ForwardBatch:
    """Blocks dealt out in a scattered order."""
    free = torch.randperm(64, generator=torch.Generator().manual_seed(1)).tolist()
    sequences = []
    for context in contexts:
        count = -(-context // BLOCK_SIZE)
        blocks, free = free[:count], free[count:]
        sequences.append(SequenceInput([1], [context - 1], blocks, context - 1))
    return ForwardBatch.pack(sequences, BLOCK_SIZE)


def step(kv: KvCache, batch: ForwardBatch, num_heads: int) -> tuple[torch.Tensor, ...]:
    """A query each, as a slice of a wider tensor, and the key and value the cache holds for it."""
    generator = torch.Generator().manual_seed(2)
    wide = torch.randn(batch.num_seqs, num_heads + 3, kv.geometry.head_dim, generator=generator)
    keys, values = kv.layer_slots(1)
    slots = batch.slot_mapping
    return wide.to(kv.data.dtype)[:, :num_heads], keys[slots], values[slots]


@needs_compiled
@pytest.mark.parametrize("group", [1, 2, 7])
@pytest.mark.parametrize("head_dim", [8, 64, 72, 128])
def test_pages_agree_with_float64(group: int, head_dim: int) -> None:
    kv = cache("float32", kv_heads=2, head_dim=head_dim)
    exact = KvCache(KvGeometry(2, 2, head_dim, BLOCK_SIZE, "float64"), 64)
    exact.data.copy_(kv.data)
    batch = decode_batch(CONTEXTS)
    q, k, v = step(kv, batch, 2 * group)
    plan = CpuAttention().plan(batch, kv)
    assert isinstance(plan, PagedPlan)
    reference = SdpaAttention().plan(batch, exact)
    expected = reference.attend(1, q.double(), k.double(), v.double(), exact)
    assert float((plan.attend(1, q, k, v, kv) - expected).abs().max()) < 5e-6


@needs_compiled
def test_bfloat16_is_right_to_one_rounding() -> None:
    kv = cache("bfloat16", kv_heads=2, head_dim=64)
    exact = KvCache(KvGeometry(2, 2, 64, BLOCK_SIZE, "float64"), 64)
    exact.data.copy_(kv.data)
    batch = decode_batch(CONTEXTS)
    q, k, v = step(kv, batch, 14)
    expected = (
        SdpaAttention().plan(batch, exact).attend(1, q.double(), k.double(), v.double(), exact)
    )
    got = CpuAttention().plan(batch, kv).attend(1, q, k, v, kv)
    assert got.dtype == torch.bfloat16
    assert bool(((got - expected).abs() <= expected.abs() * 2.0**-8 + 1e-5).all())


@needs_compiled
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_sequence_does_not_depend_on_its_batch(dtype: str) -> None:
    kv = cache(dtype, kv_heads=2, head_dim=64)
    batch = decode_batch(CONTEXTS)
    q, k, v = step(kv, batch, 6)
    together = CpuAttention().plan(batch, kv).attend(1, q, k, v, kv)
    for i, context in enumerate(CONTEXTS):
        blocks = batch.block_tables[i, : -(-context // BLOCK_SIZE)].tolist()
        single = ForwardBatch.pack(
            [SequenceInput([1], [context - 1], blocks, context - 1)], BLOCK_SIZE
        )
        alone = (
            CpuAttention().plan(single, kv).attend(1, q[i : i + 1], k[i : i + 1], v[i : i + 1], kv)
        )
        assert torch.equal(alone[0], together[i])


@needs_compiled
def test_a_sliding_layer_sees_its_window_only() -> None:
    kv = cache("float32", kv_heads=2, head_dim=64)
    batch = decode_batch(CONTEXTS)
    q, k, v = step(kv, batch, 4)
    got = CpuAttention().plan(batch, kv, (None, 10)).attend(1, q, k, v, kv).view(-1, 4, 64)
    keys, values = kv.layer_slots(1)
    for i, context in enumerate(CONTEXTS):
        token = torch.arange(max(0, context - 10), context)
        slots = batch.block_tables[i, token // BLOCK_SIZE] * BLOCK_SIZE + token % BLOCK_SIZE
        for head in range(4):
            weights = (keys[slots, head // 2] @ q[i, head] / 8.0).softmax(0)
            expected = weights @ values[slots, head // 2]
            assert float((got[i, head] - expected).abs().max()) < 5e-6


@needs_compiled
@pytest.mark.parametrize("window", [None, 21])
@pytest.mark.parametrize("block_size", [1, 5, 16, 64])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("heads", [Heads(3, 1, 64), Heads(2, 7, 64), Heads(1, 13, 48)])
def test_nothing_beyond_a_context_is_looked_at(
    heads: Heads, dtype: torch.dtype, tolerance: float, block_size: int, window: int | None
) -> None:
    lens = [(cached, 1) for cached in (0, 14, 15, 16, 31, 32, 200)]
    step = paged_step(lens, heads, block_size=block_size, dtype=dtype, device="cpu")
    plan = CpuAttention().plan(step.batch, step.kv, (window,))
    assert isinstance(plan, PagedPlan)
    got = plan.attend(0, step.q, step.k, step.k, step.kv)
    assert float((got - float64_attention(step, window)).abs().max()) < tolerance


@needs_compiled
@pytest.mark.parametrize("head_dim", [8, 40, 64])
def test_bfloat16_without_products_of_pairs(head_dim: int) -> None:
    pages = pytest.importorskip("shared.model.kernels.pages")
    step = paged_step(
        [(40, 1), (99, 1)],
        Heads(2, 3, head_dim),
        block_size=16,
        dtype=torch.bfloat16,
        device="cpu",
    )
    plan = PagedPlan(step.batch, step.kv, (None,), pages.attend_bf16)
    got = plan.attend(0, step.q, step.k, step.k, step.kv)
    assert float((got - float64_attention(step)).abs().max()) < 1e-2


def test_everything_else_goes_to_torch() -> None:
    float64 = cache("float64", kv_heads=2, head_dim=64)
    odd = cache("float32", kv_heads=2, head_dim=20)
    for kv in (float64, odd):
        assert isinstance(CpuAttention().plan(decode_batch((5,)), kv), SdpaPlan)
    prompt = ForwardBatch.pack([SequenceInput([1, 2], [0, 1], [3])], BLOCK_SIZE)
    for kv in (float64, odd):
        assert isinstance(CpuAttention().plan(prompt, kv), SdpaPlan)
