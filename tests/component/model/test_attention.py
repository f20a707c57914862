"""Attention backends against a dense float64 computation: ragged batches, windows, spans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from shared.cache.geometry import KvGeometry
from shared.cache.kv_cache import KvCache
from shared.model import attention
from shared.model.attention import AttentionBackend, SdpaAttention
from shared.model.batch import ForwardBatch, SequenceInput

HEAD_DIM, BLOCK_SIZE = 8, 4
WINDOWS = (None, 1, 3, 5, 64)


@dataclass(frozen=True)
class Case:
    """One sequence: tokens in the cache, new ones, and spans that see each other."""

    num_cached: int
    num_new: int
    spans: tuple[tuple[int, int], ...] = ()


BATCHES = {
    "whole prompts": [Case(0, 7), Case(0, 1), Case(0, 12)],
    "decoding": [Case(6, 1), Case(1, 1), Case(13, 1)],
    "chunks and decoding": [Case(5, 6), Case(9, 1), Case(0, 3), Case(11, 2)],
    "spans": [Case(0, 12, ((2, 6), (7, 8), (8, 11))), Case(4, 5, ((1, 3), (5, 9))), Case(8, 1)],
}


@pytest.mark.parametrize("max_masked_queries", [2, 512])
@pytest.mark.parametrize("backend", [SdpaAttention()])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("batch_name", BATCHES)
def test_equals_a_dense_computation(
    backend: AttentionBackend,
    groups: int,
    batch_name: str,
    max_masked_queries: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "MAX_MASKED_QUERIES", max_masked_queries)
    cases = BATCHES[batch_name]
    batch, kv, contexts = _cached(cases)
    q = _queries(batch, 2 * groups)
    plan = backend.plan(batch, kv, WINDOWS)
    for layer, window in enumerate(WINDOWS):
        ours = plan.attend(layer, q, *_new_keys_and_values(cases, contexts, layer), kv)
        pieces = q.split([case.num_new for case in cases])
        dense = [
            _dense(piece, context[layer], case, window)
            for piece, case, context in zip(pieces, cases, contexts, strict=True)
        ]
        torch.testing.assert_close(ours, torch.cat(dense), rtol=0, atol=1e-12)


def test_no_windows_means_all_of_the_context() -> None:
    cases = BATCHES["chunks and decoding"]
    batch, kv, contexts = _cached(cases)
    q, (k, v) = _queries(batch, 2), _new_keys_and_values(cases, contexts, 2)
    backend = SdpaAttention()
    without, with_none = (
        backend.plan(batch, kv, windows).attend(2, q, k, v, kv) for windows in ((), (None,) * 5)
    )
    assert torch.equal(without, with_none)


def _queries(batch: ForwardBatch, num_heads: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (batch.num_tokens, num_heads, HEAD_DIM)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _new_keys_and_values(
    cases: Sequence[Case], contexts: Sequence[torch.Tensor], layer: int
) -> list[torch.Tensor]:
    return [
        torch.cat([c[layer, i, case.num_cached :] for case, c in zip(cases, contexts, strict=True)])
        for i in (0, 1)
    ]


def _cached(cases: Sequence[Case]) -> tuple[ForwardBatch, KvCache, list[torch.Tensor]]:
    """A batch, a cache that holds its contexts, and these, `[layers, 2, tokens, heads, dim]`."""
    geometry = KvGeometry(
        num_layers=len(WINDOWS),
        num_kv_heads=2,
        head_dim=HEAD_DIM,
        block_size=BLOCK_SIZE,
        dtype="float64",
    )
    kv = KvCache(geometry, 32)
    generator = torch.Generator().manual_seed(0)
    # Blocks of different sequences alternate, so that no context is contiguous by luck.
    blocks = iter(torch.randperm(32, generator=generator).tolist())
    sequences, contexts = [], []
    for case in cases:
        num_tokens = case.num_cached + case.num_new
        ids = [next(blocks) for _ in range(-(-num_tokens // BLOCK_SIZE))]
        shape = (len(WINDOWS), 2, num_tokens, 2, HEAD_DIM)
        context = torch.randn(shape, generator=generator, dtype=torch.float64)
        kv.scatter(ids, context, slice(0, len(WINDOWS)))
        contexts.append(context)
        positions = range(case.num_cached, num_tokens)
        sequences.append(
            SequenceInput(
                [1] * case.num_new,
                list(positions),
                ids,
                case.num_cached,
                bidirectional_spans=case.spans,
            )
        )
    return ForwardBatch.pack(sequences, BLOCK_SIZE), kv, contexts


def _dense(q: torch.Tensor, context: torch.Tensor, case: Case, window: int | None) -> torch.Tensor:
    """Query by query, head by head, from the definition."""
    out = torch.empty_like(q)
    groups = q.shape[1] // context.shape[2]
    for i in range(case.num_new):
        me = case.num_cached + i
        seen = [
            other
            for other in range(case.num_cached + case.num_new)
            if (other <= me or any(a <= me < b and a <= other < b for a, b in case.spans))
            and (window is None or other > me - window)
        ]
        for head in range(q.shape[1]):
            keys, values = context[:, seen, head // groups]
            weights = torch.softmax(keys @ q[i, head] / HEAD_DIM**0.5, dim=0)
            out[i, head] = weights @ values
    return out.flatten(1)
