"""Batches of conversations for training, made in a process of its own so that the trainer never
waits for a drawing."""

from __future__ import annotations

import multiprocessing as mp
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from multiprocessing.queues import Queue
from queue import Full

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from examples.plates.architecture import MERGE, PATCH_PX
from examples.plates.encode import (
    IGNORED,
    ConversationCode,
    Encoder,
    IntArray,
    encode_picture,
    without_text,
)
from examples.plates.questions import crowded_picture, training_stream

WINDOW_PX = 112
BARE_BATCH_PATCHES = 3000


@dataclass(frozen=True)
class Segments:
    """Runs of patches that attend to each other, grouped by length so that each group is one
    batched attention.

    order: [patches] patches in group order; groups: (runs, length) of each group, in that order.
    """

    order: IntArray
    groups: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class TextBatch:
    """Conversations padded on the right to one length."""

    ids: IntArray  # [conversations, tokens]
    targets: IntArray  # [conversations, tokens]
    positions: IntArray  # [3, conversations, tokens]
    matches: IntArray  # [conversations, tokens]: see `ConversationCode`
    tallies: IntArray  # [conversations, tokens, 4]: see `ConversationCode`

    @classmethod
    def padded(cls, codes: Sequence[ConversationCode], pad_id: int) -> TextBatch:
        """One row for each conversation."""
        longest = max(len(code.ids) for code in codes)

        def table(rows: Iterable[IntArray], fill: int) -> IntArray:
            return np.stack([_padded(row, longest, fill) for row in rows])

        return cls(
            table((code.ids for code in codes), pad_id),
            table((code.targets for code in codes), IGNORED),
            np.stack([table((code.positions[axis] for code in codes), 0) for axis in range(3)]),
            table((code.matches for code in codes), 0),
            table((code.tallies for code in codes), 0),
        )


def _padded(row: IntArray, length: int, fill: int) -> IntArray:
    """`row` with its first axis filled up to `length`."""
    missing = [(0, length - len(row)), *((0, 0) for _ in row.shape[1:])]
    return np.pad(row, missing, constant_values=fill)


@dataclass(frozen=True)
class Batch:
    """Conversations with the patches of all their pictures packed, windows side by side."""

    text: TextBatch
    patches: NDArray[np.uint8]  # [patches, 3 * PATCH_PX * PATCH_PX]
    patch_positions: IntArray  # [patches, 2]: row, column
    hints: IntArray  # [patches, 11]
    windows: Segments
    pictures: Segments
    token_order: IntArray  # [patches / 4]: place of each picture token among the packed ones


@dataclass(frozen=True)
class _Layout:
    """How one grid of patches is packed."""

    patch_order: IntArray
    token_order: IntArray
    positions: IntArray
    window_lengths: tuple[int, ...]


@lru_cache(maxsize=512)
def _layout(rows: int, columns: int) -> _Layout:
    grid = torch.tensor([[1, rows, columns]])
    window_index, ends = get_vision_window_index(grid, MERGE, WINDOW_PX, PATCH_PX)
    unit = MERGE * MERGE
    order = (window_index[:, None] * unit + torch.arange(unit)).reshape(-1)
    positions = get_vision_position_ids(grid, MERGE)[order]
    lengths = tuple((ends[1:] - ends[:-1]).tolist())
    return _Layout(order.numpy(), torch.argsort(window_index).numpy(), positions.numpy(), lengths)


def segments(lengths: list[int]) -> Segments:
    """Groups consecutive runs of the given lengths by length."""
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    orders, groups = [], []
    for length in sorted(set(lengths)):
        chosen = starts[np.array(lengths) == length]
        orders.append((chosen[:, None] + np.arange(length)).reshape(-1))
        groups.append((len(chosen), length))
    return Segments(np.concatenate(orders), tuple(groups))


def collate(codes: list[ConversationCode], pad_id: int) -> Batch:
    """One batch; at least one conversation must hold a picture."""
    pictures = [picture for code in codes for picture in code.pictures]
    layouts = [_layout(*picture.grid) for picture in pictures]
    sizes = [len(layout.token_order) for layout in layouts]
    offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    pairs = list(zip(pictures, layouts, strict=True))
    return Batch(
        TextBatch.padded(codes, pad_id),
        np.concatenate([picture.patches[layout.patch_order] for picture, layout in pairs]),
        np.concatenate([layout.positions for layout in layouts]),
        np.concatenate([picture.hints[layout.patch_order] for picture, layout in pairs]),
        segments([length for layout in layouts for length in layout.window_lengths]),
        segments([len(layout.patch_order) for layout in layouts]),
        np.concatenate(
            [layout.token_order + at for layout, at in zip(layouts, offsets, strict=True)]
        ),
    )


@dataclass(frozen=True)
class Diet:
    """What a stage of training is fed.

    batch_tokens: patches and tokens of a batch; bare_share: share of samples that are a crowded
    picture without any text, for the vision tower alone (in batches of their own).
    """

    seed: int
    max_turns: int
    max_pictures: int
    batch_tokens: int
    bare_share: float = 0.0
    drill_share: float = 0.0


def batches(tokenizer: Tokenizer, diet: Diet, pool: int = 384) -> Iterator[Batch]:
    """Endless batches of conversations of similar length, in random order."""
    encoder = Encoder(tokenizer)
    rng = np.random.default_rng(diet.seed)
    pad_id = encoder.token_id("<|endoftext|>")
    stream = _codes(encoder, diet)
    while True:
        codes = sorted(islice(stream, pool), key=_length)
        bare, spoken = [c for c in codes if not c.ids.size], [c for c in codes if c.ids.size]
        ready = [*cut(spoken, diet.batch_tokens), *cut(bare, BARE_BATCH_PATCHES)]
        for index in rng.permutation(len(ready)):
            if any(code.pictures for code in ready[index]):
                yield collate(ready[index], pad_id)


def _codes(encoder: Encoder, diet: Diet) -> Iterator[ConversationCode]:
    rng = random.Random(f"pictures-{diet.seed}")
    chats = training_stream(
        diet.seed,
        max_turns=diet.max_turns,
        max_pictures=diet.max_pictures,
        drill_share=diet.drill_share,
    )
    for chat in chats:
        while rng.random() < diet.bare_share:
            yield without_text(encode_picture(crowded_picture(rng)))
        yield encoder.encode(chat)


def _length(code: ConversationCode) -> int:
    return len(code.ids) + sum(len(picture.patches) for picture in code.pictures)


def cut(codes: list[ConversationCode], batch_tokens: int) -> Iterator[list[ConversationCode]]:
    """Slices whose patches and tokens stay near `batch_tokens`."""
    batch: list[ConversationCode] = []
    cost = 0
    for code in codes:
        batch.append(code)
        cost += _length(code)
        if cost >= batch_tokens:
            yield batch
            batch, cost = [], 0
    if batch:
        yield batch


def _serve(queue: Queue[Batch], tokenizer_json: str, diet: Diet) -> None:
    os.nice(3)
    torch.set_num_threads(1)
    for batch in batches(Tokenizer.from_str(tokenizer_json), diet):
        if not _put(queue, batch):
            queue.cancel_join_thread()  # nobody reads the pipe any more: do not wait for it
            return


def _put(queue: Queue[Batch], batch: Batch) -> bool:
    """Waits for room; False if the trainer has gone without a word."""
    trainer = mp.parent_process()
    while trainer is not None and trainer.is_alive():
        with suppress(Full):
            queue.put(batch, timeout=5)
            return True
    return False


class BatchProcess:
    """Batches from a child process, a few ahead; `close` ends it."""

    def __init__(self, tokenizer: Tokenizer, diet: Diet) -> None:
        context = mp.get_context("spawn")
        self._queue: Queue[Batch] = context.Queue(maxsize=12)
        arguments = (self._queue, tokenizer.to_str(), diet)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()

    def next(self) -> Batch:
        return self._queue.get(timeout=300)

    def close(self) -> None:
        self._process.terminate()
        self._process.join()
