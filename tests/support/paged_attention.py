"""Random packed steps over a paged cache, and their attention in float64.

In: lengths, head counts, sizes. Out: a step whose cache holds NaN wherever no sequence has a token,
so that a kernel that reads too far is found out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shared.cache.geometry import KvGeometry
from shared.cache.kv_cache import KvCache
from shared.model.batch import ForwardBatch, SequenceInput

TOLERANCES = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Largest errors allowed for values of unit variance; a key too many or too few costs more."""


@dataclass(frozen=True)
class Heads:
    """Head counts and width."""

    num_kv_heads: int
    group: int
    head_dim: int

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group


@dataclass(frozen=True, eq=False)
class PagedStep:
    """New tokens' queries `[num_tokens, heads, head_dim]` and the cache they look into."""

    batch: ForwardBatch
    kv: KvCache
    q: torch.Tensor
    heads: Heads

    @property
    def k(self) -> torch.Tensor:
        """The new keys `[num_tokens, kv_heads, head_dim]`; values likewise at index 1."""
        return self.kv.layer_slots(0)[0, self.batch.slot_mapping]

    def only(self, index: int) -> PagedStep:
        """One of the sequences in a batch of its own, over the same cache."""
        start, stop = self.batch.cu_seqlens_q[index : index + 2].tolist()
        batch = ForwardBatch(
            token_ids=self.batch.token_ids[start:stop],
            positions=self.batch.positions[start:stop],
            slot_mapping=self.batch.slot_mapping[start:stop],
            cu_seqlens_q=torch.tensor([0, stop - start], device=self.q.device),
            context_lens=self.batch.context_lens[index : index + 1],
            block_tables=self.batch.block_tables[index : index + 1],
        )
        return PagedStep(batch, self.kv, self.q[start:stop], self.heads)


def paged_step(
    lens: Sequence[tuple[int, int]],
    heads: Heads,
    *,
    block_size: int,
    dtype: torch.dtype,
    device: str,
    seed: int = 0,
) -> PagedStep:
    """A step of sequences with `(cached, new)` tokens in blocks that lie in random order."""
    generator = torch.Generator().manual_seed(seed)
    num_blocks = [-(-(cached + new) // block_size) for cached, new in lens]
    order = torch.randperm(sum(num_blocks) + 2, generator=generator).tolist()
    names = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
    geometry = KvGeometry(1, heads.num_kv_heads, heads.head_dim, block_size, names[dtype])
    kv = KvCache(geometry, len(order), device=device)
    kv.data.fill_(torch.nan)
    sequences = []
    for (cached, new), count in zip(lens, num_blocks, strict=True):
        blocks = [order.pop() for _ in range(count)]
        shape = (1, 2, cached + new, heads.num_kv_heads, heads.head_dim)
        kv.scatter(blocks, torch.randn(shape, generator=generator).to(device, dtype))
        positions = range(cached, cached + new)
        sequences.append(SequenceInput([0] * new, positions, blocks, num_cached_tokens=cached))
    batch = ForwardBatch.pack(sequences, block_size, device=device)
    # As the model has them: query heads in front of key heads of the same tokens.
    width = heads.num_heads + heads.num_kv_heads
    qk = torch.randn(batch.num_tokens, width, heads.head_dim, generator=generator)
    return PagedStep(batch, kv, qk.to(device, dtype)[:, : heads.num_heads], heads)


def float64_attention(step: PagedStep, window: int | None = None) -> torch.Tensor:
    """What the step's attention should be, `[num_tokens, heads * head_dim]` float64."""
    bounds = step.batch.cu_seqlens_q.tolist()
    cached = step.kv.layer_slots(0).double().cpu()
    out = []
    for i, context in enumerate(step.batch.context_lens.tolist()):
        q = step.q[bounds[i] : bounds[i + 1]].double().cpu()
        token = torch.arange(context)
        table = step.batch.block_tables[i].cpu()
        slots = table[token // step.kv.block_size] * step.kv.block_size
        keys, values = cached[:, slots + token % step.kv.block_size]
        stop = torch.arange(context - len(q), context) + 1
        start = stop - window if window else torch.zeros_like(stop)
        if step.batch.attend_stops is not None:
            stop = step.batch.attend_stops[bounds[i] : bounds[i + 1]].cpu()
        seen = (token >= start[:, None]) & (token < stop[:, None])
        keys, values = (x.repeat_interleave(step.heads.group, dim=1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", q, keys) * step.heads.head_dim**-0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, values).flatten(1))
    return torch.cat(out)
