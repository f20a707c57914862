"""One step's work, packed.

In: sequences, each with new tokens, their positions and the blocks that hold its context. Out: a
`ForwardBatch` of flat tensors without any padding between sequences. Prefill of whole prompts, a
chunk after a cached prefix and decoding are the same thing here: a sequence has `num_cached_tokens`
in the KV cache and brings one or more new tokens. This module does not know how attention uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class SequenceInput:
    """One sequence's share of a step.

    `positions`: `[num_new]`, or `[3, num_new]` for M-RoPE. `block_ids` must cover
    `num_cached_tokens + num_new` tokens. `media_index` `[num_media_rows]` counts from the first new
    token and names the rows whose embedding is replaced by `media_embeddings`
    `[num_media_rows, embedding_width]`. The tokens of one of `bidirectional_spans`, `(start, stop)`
    counted from the sequence's first token, see each other whole; a span must be computed in one
    step. Spans that are cached already change nothing and may be given.
    """

    token_ids: IntArray | Sequence[int]
    positions: IntArray | Sequence[int]
    block_ids: Sequence[int]
    num_cached_tokens: int = 0
    media_index: IntArray | Sequence[int] = ()
    media_embeddings: torch.Tensor | None = None
    bidirectional_spans: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True, slots=True, eq=False)
class ForwardBatch:
    """The packed step. Index tensors are int64 and live on the model's device.

    `context_lens` counts the tokens that attention sees per sequence: cached ones and new ones.
    `block_tables` is padded with block 0, which is never read beyond `context_lens`.
    `attend_stops` says per new token how many tokens of its own sequence it may see, counted from
    the sequence's start: itself and all before it, or up to the end of its bidirectional span.
    None where no span is longer than that.
    """

    token_ids: torch.Tensor  # [num_tokens]
    positions: torch.Tensor  # [num_tokens] or [3, num_tokens]
    slot_mapping: torch.Tensor  # [num_tokens]
    cu_seqlens_q: torch.Tensor  # [num_seqs + 1]
    context_lens: torch.Tensor  # [num_seqs]
    block_tables: torch.Tensor  # [num_seqs, max_blocks]
    media_index: torch.Tensor | None = None  # [num_media_rows], rows of the packed batch
    media_embeddings: torch.Tensor | None = None  # [num_media_rows, embedding_width]
    attend_stops: torch.Tensor | None = None  # [num_tokens]

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids.shape[0])

    @property
    def num_seqs(self) -> int:
        return int(self.context_lens.shape[0])

    def last_tokens(self) -> ForwardBatch:
        """The step as if all tokens but the last of each sequence had been in the cache before.

        A span that is not cut ends with its sequence at the latest, so the last token sees all.
        """
        rows = self.cu_seqlens_q[1:] - 1
        return ForwardBatch(
            token_ids=self.token_ids[rows],
            positions=self.positions[..., rows],
            slot_mapping=self.slot_mapping[rows],
            cu_seqlens_q=torch.arange(self.num_seqs + 1, device=rows.device),
            context_lens=self.context_lens,
            block_tables=self.block_tables,
        )

    @classmethod
    def pack(
        cls,
        sequences: Sequence[SequenceInput],
        block_size: int,
        *,
        device: torch.device | str = "cpu",
    ) -> ForwardBatch:
        """Lay sequences end to end, in order. Raises `ValueError` where their sizes disagree."""
        if not sequences:
            raise ValueError("a batch needs at least one sequence")
        tokens = [np.asarray(sequence.token_ids, dtype=np.int64) for sequence in sequences]
        lens = np.array([len(ids) for ids in tokens], dtype=np.int64)
        cached = np.array([sequence.num_cached_tokens for sequence in sequences], dtype=np.int64)
        starts = np.concatenate(([0], np.cumsum(lens)))
        slots = [_slots(*item, block_size) for item in zip(sequences, lens.tolist(), strict=True)]
        media_index, media_embeddings = _pack_media(sequences, starts.tolist())
        attend_stops = _pack_stops(sequences, lens.tolist())

        def move(array: IntArray) -> torch.Tensor:
            return torch.from_numpy(array).to(device)

        return cls(
            token_ids=move(np.concatenate(tokens)),
            positions=move(_pack_positions(sequences, lens.tolist())),
            slot_mapping=move(np.concatenate(slots)),
            cu_seqlens_q=move(starts),
            context_lens=move(cached + lens),
            block_tables=move(_pad_tables(sequences)),
            media_index=None if media_index is None else move(media_index),
            media_embeddings=None if media_embeddings is None else media_embeddings.to(device),
            attend_stops=None if attend_stops is None else move(attend_stops),
        )


def _slots(sequence: SequenceInput, num_new: int, block_size: int) -> IntArray:
    """Slots of the new tokens, `[num_new]`."""
    stop = sequence.num_cached_tokens + num_new
    if num_new < 1 or stop > len(sequence.block_ids) * block_size:
        raise ValueError(
            f"{sequence.num_cached_tokens} cached and {num_new} new tokens "
            f"do not fit into {len(sequence.block_ids)} blocks of {block_size}"
        )
    token = np.arange(sequence.num_cached_tokens, stop, dtype=np.int64)
    blocks = np.asarray(sequence.block_ids, dtype=np.int64)
    return blocks[token // block_size] * block_size + token % block_size


def _pack_positions(sequences: Sequence[SequenceInput], lens: Sequence[int]) -> IntArray:
    """`[num_tokens]`, or `[3, num_tokens]` as soon as one sequence has three axes."""
    arrays = [np.asarray(sequence.positions, dtype=np.int64) for sequence in sequences]
    for array, num_new in zip(arrays, lens, strict=True):
        if array.shape not in ((num_new,), (3, num_new)):
            raise ValueError(f"positions of shape {array.shape} for {num_new} new tokens")
    if any(array.ndim == 2 for array in arrays):
        # A text token has the same position on all three axes.
        arrays = [np.broadcast_to(array, (3, array.shape[-1])) for array in arrays]
    return np.concatenate(arrays, axis=-1)


def _pad_tables(sequences: Sequence[SequenceInput]) -> IntArray:
    width = max(len(sequence.block_ids) for sequence in sequences)
    tables = np.zeros((len(sequences), width), dtype=np.int64)
    for row, sequence in zip(tables, sequences, strict=True):
        row[: len(sequence.block_ids)] = sequence.block_ids
    return tables


def _pack_media(
    sequences: Sequence[SequenceInput], starts: Sequence[int]
) -> tuple[IntArray | None, torch.Tensor | None]:
    rows, embeddings = [], []
    for sequence, start in zip(sequences, starts, strict=False):
        if sequence.media_embeddings is None:
            continue
        index = np.asarray(sequence.media_index, dtype=np.int64)
        if len(index) != sequence.media_embeddings.shape[0]:
            raise ValueError(
                f"{len(index)} media rows but {sequence.media_embeddings.shape[0]} embeddings"
            )
        rows.append(index + start)
        embeddings.append(sequence.media_embeddings)
    if not rows:
        return None, None
    return np.concatenate(rows), torch.cat(embeddings)


def _pack_stops(sequences: Sequence[SequenceInput], lens: Sequence[int]) -> IntArray | None:
    """How far each new token may see, `[num_tokens]`; None where all see up to themselves."""
    if not any(sequence.bidirectional_spans for sequence in sequences):
        return None
    stops = [_stops(sequence, num_new) for sequence, num_new in zip(sequences, lens, strict=True)]
    return np.concatenate(stops)


def _stops(sequence: SequenceInput, num_new: int) -> IntArray:
    cached = sequence.num_cached_tokens
    stops = np.arange(cached + 1, cached + num_new + 1, dtype=np.int64)
    for start, stop in sequence.bidirectional_spans:
        if start < cached + num_new < stop:
            raise ValueError(
                f"bidirectional span {start}..{stop} is cut at token {cached + num_new}; "
                "its tokens must be computed in one step"
            )
        stops[max(start - cached, 0) : max(stop - cached, 0)] = stop
    return stops
