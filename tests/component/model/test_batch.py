"""Packing sequences of any length into one step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shared.model.batch import ForwardBatch, SequenceInput


def test_a_prefill_and_a_decode_share_a_batch() -> None:
    prefill = SequenceInput([10, 11, 12], range(3), block_ids=[4])
    decode = SequenceInput([13], [9], block_ids=[7, 2, 5], num_cached_tokens=9)
    batch = ForwardBatch.pack([prefill, decode], block_size=4)
    assert batch.token_ids.tolist() == [10, 11, 12, 13]
    assert batch.positions.tolist() == [0, 1, 2, 9]
    assert batch.slot_mapping.tolist() == [16, 17, 18, 21]
    assert batch.cu_seqlens_q.tolist() == [0, 3, 4]
    assert batch.context_lens.tolist() == [3, 10]
    assert batch.block_tables.tolist() == [[4, 0, 0], [7, 2, 5]]
    assert batch.media_index is None
    assert (batch.num_tokens, batch.num_seqs) == (4, 2)


def test_text_gets_three_axes_beside_a_picture() -> None:
    text = SequenceInput([1, 2], [0, 1], block_ids=[0])
    picture = SequenceInput([3, 4], np.array([[0, 1], [0, 2], [0, 3]]), block_ids=[1])
    batch = ForwardBatch.pack([text, picture], block_size=4)
    assert batch.positions.tolist() == [[0, 1, 0, 1], [0, 1, 0, 2], [0, 1, 0, 3]]


def test_media_rows_count_within_the_packed_batch() -> None:
    first = SequenceInput([1, 2], [0, 1], [0], media_index=[1], media_embeddings=torch.ones(1, 8))
    second = SequenceInput([3], [0], [1])
    third = SequenceInput(
        [4, 5, 6], [0, 1, 2], [2], media_index=[0, 2], media_embeddings=torch.zeros(2, 8)
    )
    batch = ForwardBatch.pack([first, second, third], block_size=4)
    assert batch.media_index is not None
    assert batch.media_embeddings is not None
    assert batch.media_index.tolist() == [1, 3, 5]
    assert batch.media_embeddings[:, 0].tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        (SequenceInput([1, 2], [0, 1], [0], num_cached_tokens=3), "3 cached and 2 new tokens"),
        (SequenceInput([], [], [0]), "0 new tokens"),
        (SequenceInput([1, 2], [0], [0]), "positions of shape"),
        (
            SequenceInput([1], [0], [0], media_index=[0], media_embeddings=torch.ones(2, 8)),
            "1 media rows but 2 embeddings",
        ),
    ],
)
def test_disagreeing_sizes_are_refused(sequence: SequenceInput, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ForwardBatch.pack([sequence], block_size=4)


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sequence"):
        ForwardBatch.pack([], block_size=4)


def test_spans_say_how_far_each_token_sees() -> None:
    plain = SequenceInput([1, 2], [4, 5], [0, 1], num_cached_tokens=4)
    # The first span is cached, the second begins in the cache, the third is new.
    spans = SequenceInput(
        [1] * 6, range(3, 9), [2, 3, 4], 3, bidirectional_spans=[(0, 2), (2, 5), (6, 8)]
    )
    batch = ForwardBatch.pack([plain, spans], block_size=4)
    assert batch.attend_stops is not None
    assert batch.attend_stops.tolist() == [5, 6, 5, 5, 6, 8, 8, 9]
    assert ForwardBatch.pack([plain], block_size=4).attend_stops is None


def test_a_step_must_not_cut_a_span() -> None:
    cut = SequenceInput([1] * 3, range(3), [0], bidirectional_spans=[(1, 4)])
    with pytest.raises(ValueError, match=r"span 1\.\.4 is cut at token 3"):
        ForwardBatch.pack([cut], block_size=4)
    ForwardBatch.pack([SequenceInput([1], [0], [0], bidirectional_spans=[(1, 4)])], block_size=4)
