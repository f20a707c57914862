"""Batches of conversations for training, drawn in processes of their own."""

from __future__ import annotations

import multiprocessing as mp
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from multiprocessing.connection import Connection
from typing import TypeVar

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from examples.plates.architecture import MERGE, PATCH_PX
from examples.plates.encode import IGNORED, ConversationCode, Encoder, Gaze, without_text
from examples.plates.picture_code import ByteArray, IntArray, encode_picture
from examples.plates.questions import crowded_picture, training_stream

T = TypeVar("T", IntArray, ByteArray)

WINDOW_PX = 112
BARE_BATCH_PATCHES = 3072
PATCH_UNIT = 512
TEXT_UNIT = 32
"""Batches are filled up to multiples of these: each new shape of a matrix product costs a CPU
several milliseconds once."""
BURST = 24
"""Batches that a process draws at a time."""


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
    gaze: Gaze

    @classmethod
    def padded(cls, codes: Sequence[ConversationCode], pad_id: int) -> TextBatch:
        """One row for each conversation."""
        longest = _rounded_up(max(len(code.ids) for code in codes), TEXT_UNIT)

        def table(rows: Iterable[IntArray], fill: int) -> IntArray:
            return np.stack([_padded(row, longest, fill) for row in rows])

        return cls(
            table((code.ids for code in codes), pad_id),
            table((code.targets for code in codes), IGNORED),
            np.stack([table((code.positions[axis] for code in codes), 0) for axis in range(3)]),
            table((code.matches for code in codes), 0),
            Gaze(
                _numbered(code.gaze.looks for code in codes),
                _numbered(code.gaze.tallies for code in codes),
                _numbered(code.gaze.reads for code in codes),
            ),
        )


def _numbered(pairs: Iterable[IntArray]) -> IntArray:
    """All pairs, each after the number of the conversation it is from."""
    return np.concatenate(
        [np.pad(found, ((0, 0), (1, 0)), constant_values=n) for n, found in enumerate(pairs)]
    )


def _rounded_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _padded(row: T, length: int, fill: int) -> T:
    """`row` with its first axis filled up to `length`."""
    filled = np.full_like(row, fill, shape=(length, *row.shape[1:]))
    filled[: len(row)] = row
    return filled


@dataclass(frozen=True)
class Batch:
    """Conversations with the patches of all their pictures packed, windows side by side, and at
    the end empty patches that fill up to a multiple of PATCH_UNIT."""

    text: TextBatch
    num_pictures: int
    patches: ByteArray  # [filled patches, 3 * PATCH_PX * PATCH_PX]
    patch_positions: IntArray  # [filled patches, 2]: row, column
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
    patches = np.concatenate([picture.patches[layout.patch_order] for picture, layout in pairs])
    filled = _rounded_up(len(patches), PATCH_UNIT)
    rest = [filled - len(patches)] if filled > len(patches) else []
    return Batch(
        TextBatch.padded(codes, pad_id),
        len(pictures),
        _padded(patches, filled, 0),
        _padded(np.concatenate([layout.positions for layout in layouts]), filled, 0),
        np.concatenate([picture.hints[layout.patch_order] for picture, layout in pairs]),
        segments([length for layout in layouts for length in layout.window_lengths] + rest),
        segments([len(layout.patch_order) for layout in layouts] + rest),
        np.concatenate(
            [layout.token_order + at for layout, at in zip(layouts, offsets, strict=True)]
        ),
    )


@dataclass(frozen=True)
class Diet:
    """What a stage of training is fed.

    batch_tokens: tokens of a batch, padding included; bare_share: share of samples that are a
    crowded picture without any text, for the vision tower alone (in batches of their own).
    """

    seed: int
    max_turns: int
    max_pictures: int
    batch_tokens: int
    bare_share: float = 0.0
    drill_share: float = 0.0


def batches(tokenizer: Tokenizer, diet: Diet) -> Iterator[Batch]:
    """Endless batches of conversations of one padded length, or of bare pictures."""
    encoder = Encoder(tokenizer)
    pad_id = encoder.token_id("<|endoftext|>")
    waiting: defaultdict[int, list[ConversationCode]] = defaultdict(list)
    for code in _codes(encoder, diet):
        length = _rounded_up(len(code.ids), TEXT_UNIT)
        group = waiting[length]
        if length == 0 and _patches([*group, code]) > BARE_BATCH_PATCHES:
            yield collate(group, pad_id)
            group.clear()
        group.append(code)
        if length and len(group) >= diet.batch_tokens // length:
            if _patches(group):
                yield collate(group, pad_id)
            group.clear()


def _patches(codes: Iterable[ConversationCode]) -> int:
    return sum(len(picture.patches) for code in codes for picture in code.pictures)


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


def _serve(trainer: Connection, tokenizer_json: str, diet: Diet) -> None:
    torch.set_num_threads(1)
    stream = batches(Tokenizer.from_str(tokenizer_json), diet)
    with suppress(EOFError, BrokenPipeError):  # the trainer has gone
        while True:
            trainer.send(list(islice(stream, trainer.recv())))


class BatchTeam:
    """Batches from child processes; `close` ends them.

    They draw in bursts, all cores at a time, while the trainer waits; in between a training step
    has all cores to itself.
    """

    def __init__(self, tokenizer: Tokenizer, diet: Diet, processes: int) -> None:
        context = mp.get_context("spawn")
        self._ready: list[Batch] = []
        self._rng = random.Random(diet.seed)
        self._processes, self._connections = [], []
        for number in range(processes):
            own, other = context.Pipe()
            own_diet = replace(diet, seed=diet.seed + 100 * number)
            arguments = (other, tokenizer.to_str(), own_diet)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            other.close()
            self._processes.append(process)
            self._connections.append(own)

    def next(self) -> Batch:
        """The next batch, after a burst of drawing if there is none left."""
        if not self._ready:
            for connection in self._connections:
                connection.send(BURST)
            self._ready = [batch for connection in self._connections for batch in connection.recv()]
            self._rng.shuffle(self._ready)
        return self._ready.pop()

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
            process.join()
