"""Conversations to arrays: token ids, what to learn, pixels as the image processor makes them, and
where marks lie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from examples.plates.architecture import MAX_PIXELS, MERGE, MIN_PIXELS, PATCH_PX, TOKEN_PX
from examples.plates.asks import Things
from examples.plates.draw import draw, marks
from examples.plates.palette import COLOUR_NAMES
from examples.plates.questions import MAX_PICTURES, Conversation
from examples.plates.specs import SHAPES, PlateSpec, Spec

IntArray = NDArray[np.int64]
ByteArray = NDArray[np.uint8]
IGNORED = -100
HINTS = (
    *("glyph", "colour", "centre", "place"),
    *("equal", "alike", "total"),
    *("background", "plate", "ink"),
    "rest",
)
"""What training says about a patch, 0 for nothing: digit or shape, its colour, whether it is the
middle, place in the number; for shapes how many of shape and colour, of the shape, in all;
everywhere the picture's colours; for digits, like their place, the place counted from the end."""
GLYPHS: tuple[str, ...] = (*"0123456789", *SHAPES)


@dataclass(frozen=True)
class PictureCode:
    """One picture in patches, in the order of the image processor (merge blocks of 2 x 2)."""

    grid: tuple[int, int]
    patches: ByteArray  # [patches, 3 * PATCH_PX * PATCH_PX], before normalisation, one frame
    hints: IntArray  # [patches, 11]: see `HINTS`


@dataclass(frozen=True, eq=False)
class ConversationCode:
    """One conversation as the model reads it."""

    ids: IntArray  # [tokens]
    targets: IntArray  # [tokens]: the next token where it is to be learned, else IGNORED
    positions: IntArray  # [3, tokens]: M-RoPE's time, height, width
    matches: IntArray  # [tokens]: see `_Writer.match`
    tallies: IntArray  # [tokens, 4]: see `_Writer.tally`
    pictures: tuple[PictureCode, ...]


def resized(picture: Image.Image) -> Image.Image:
    """The picture at the size that the image processor chooses for it."""
    height, width = smart_resize(picture.height, picture.width, TOKEN_PX, MIN_PIXELS, MAX_PIXELS)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


@lru_cache(maxsize=512)
def _block_order(rows: int, columns: int) -> IntArray:
    """Raster index of each patch in merge-block order, for a grid of patches."""
    raster = np.arange(rows * columns, dtype=np.int64)
    blocks = raster.reshape(rows // MERGE, MERGE, columns // MERGE, MERGE)
    return blocks.transpose(0, 2, 1, 3).reshape(-1)


def _colours(spec: Spec) -> tuple[int, int, int]:
    """Background, plate and ink as numbers from 1; 0 where there is none."""
    names: tuple[str | None, ...] = (spec.background, None, None)
    if isinstance(spec, PlateSpec):
        names = (spec.background, spec.plate_colour, spec.ink)
    background, plate, ink = (0 if name is None else 1 + COLOUR_NAMES.index(name) for name in names)
    return background, plate, ink


def _hints(spec: Spec, rows: int, columns: int) -> IntArray:
    found = marks(spec)
    table = np.zeros((rows, columns, len(HINTS)), dtype=np.int64)
    table[:, :, 7:10] = _colours(spec)
    equal = Counter((mark.label, mark.colour) for mark in found)
    alike = Counter(mark.label for mark in found)
    for mark in found:
        left, right = _span(mark.centre[0], mark.half_size[0], columns)
        top, bottom = _span(mark.centre[1], mark.half_size[1], rows)
        table[top:bottom, left:right, 0] = 1 + GLYPHS.index(mark.label)
        table[top:bottom, left:right, 1] = 1 + COLOUR_NAMES.index(mark.colour)
        if mark.label in SHAPES:
            counts = equal[mark.label, mark.colour], alike[mark.label], len(found)
            table[top:bottom, left:right, 4:7] = counts
    for mark in found:
        row = min(rows - 1, max(0, int(mark.centre[1] * rows)))
        column = min(columns - 1, max(0, int(mark.centre[0] * columns)))
        glyph = 1 + GLYPHS.index(mark.label)
        table[row, column, :4] = (glyph, 1 + COLOUR_NAMES.index(mark.colour), 1, mark.order)
        if mark.label not in SHAPES:
            table[row, column, 10] = 1 + len(found) - mark.order
    return table.reshape(-1, len(HINTS))


def _span(centre: float, half: float, cells: int) -> tuple[int, int]:
    """The cells whose middle lies within `half` of `centre` (both in fractions of the side)."""
    first = int(np.ceil((centre - half) * cells - 0.5))
    last = int(np.floor((centre + half) * cells - 0.5))
    return max(0, first), min(cells, last + 1)


def encode_picture(spec: Spec) -> PictureCode:
    """Draws, resizes and cuts one picture."""
    picture = resized(draw(spec))
    pixels = np.asarray(picture, dtype=np.uint8)
    rows, columns = picture.height // PATCH_PX, picture.width // PATCH_PX
    patches = pixels.reshape(rows, PATCH_PX, columns, PATCH_PX, 3).transpose(0, 2, 4, 1, 3)
    order = _block_order(rows, columns)
    return PictureCode(
        (rows, columns),
        patches.reshape(rows * columns, -1)[order],
        _hints(spec, rows, columns)[order],
    )


def picture_positions(rows: int, columns: int) -> IntArray:
    """M-RoPE positions of one picture's tokens, counted from its first. [3, tokens]."""
    height, width = rows // MERGE, columns // MERGE
    y, x = np.divmod(np.arange(height * width, dtype=np.int64), width)
    return np.stack([np.zeros_like(y), y, x])


def without_text(picture: PictureCode) -> ConversationCode:
    """A picture alone, to train the vision tower on."""
    nothing = np.zeros(0, dtype=np.int64)
    positions, tallies = np.zeros((3, 0), dtype=np.int64), np.zeros((0, MAX_PICTURES), np.int64)
    return ConversationCode(nothing, nothing, positions, nothing, tallies, (picture,))


class Encoder:
    """Turns conversations into arrays with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._image_pad = self.token_id("<|image_pad|>")

    def token_id(self, token: str) -> int:
        """The id of a token that must exist."""
        found = self._tokenizer.token_to_id(token)
        assert found is not None, token
        return int(found)

    def encode(
        self, chat: Conversation, drawn: Sequence[PictureCode] | None = None
    ) -> ConversationCode:
        """The conversation in the chat template's words; every answer and its end are to be
        learned. `drawn`: its pictures, where they exist already."""
        codes = map(encode_picture, chat.specs) if drawn is None else iter(drawn)
        writer = _Writer(self._tokenizer, self._image_pad)
        if chat.system is not None:
            writer.text(f"<|im_start|>system\n{chat.system}<|im_end|>\n")
        for turn in chat.turns:
            writer.text("<|im_start|>user\n")
            for _ in turn.pictures:
                writer.picture(next(codes))
            begin = writer.length
            writer.text(f"{turn.question}<|im_end|>\n<|im_start|>assistant\n")
            if turn.kind == "which picture":
                writer.match(begin, chat.specs)
            if turn.things is not None:
                writer.tally(begin, turn.things, chat.specs)
            writer.text(f"{turn.answer}<|im_end|>", learn=True)
            writer.text("\n")
        return writer.finish()


class _Writer:
    """Collects tokens, positions and pictures of one conversation."""

    def __init__(self, tokenizer: Tokenizer, image_pad: int) -> None:
        self._tokenizer, self._image_pad = tokenizer, image_pad
        self._ids: list[int] = []
        self._learned: list[bool] = []
        self._positions: list[IntArray] = []
        self._next = 0
        self._pictures: list[PictureCode] = []
        self._matches: dict[int, int] = {}
        self._tallies: dict[int, IntArray] = {}

    @property
    def length(self) -> int:
        """Tokens so far."""
        return len(self._ids)

    def match(self, begin: int, shown: tuple[Spec, ...]) -> None:
        """Notes, for the number asked for in the tokens from `begin`, which pictures it fits: at
        each digit those with that digit in that place, after the number those that show just it.

        A token's note is 0 for none, else 1 + the bits of the pictures it fits + 16 times the bits
        of all pictures.
        """
        numbers = [str(spec.number) if isinstance(spec, PlateSpec) else "" for spec in shown]
        everywhere = 16 * (2 ** len(numbers) - 1)
        digits = ""
        for at in range(begin, len(self._ids)):
            word = self._tokenizer.decode([self._ids[at]]).strip()
            if word.isdigit():
                fits = [number[len(digits) :].startswith(word) for number in numbers]
                digits += word
            elif digits:
                fits = [number == digits for number in numbers]
            else:
                continue
            bits = sum(2**place for place, fit in enumerate(fits) if fit)
            self._matches[at] = 1 + bits + everywhere
            if not word.isdigit():
                return

    def tally(self, begin: int, things: Things, shown: tuple[Spec, ...]) -> None:
        """Notes, at the last token that names `things` from `begin` on, how many of them each
        picture so far shows.

        A token's note holds for each picture 0 for nothing, else 1 + the number of things.
        """
        counts = [1 + things.count(spec) for spec in shown[: len(self._pictures)]]
        text = ""
        for at in range(begin, len(self._ids)):
            text += self._tokenizer.decode([self._ids[at]])
            if text.endswith(things.words):
                self._tallies[at] = np.pad(counts, (0, MAX_PICTURES - len(counts)))
                return
        raise ValueError(f"{things.words!r} does not end with a token of {text!r}")

    def text(self, text: str, *, learn: bool = False) -> None:
        ids = self._tokenizer.encode(text).ids
        self._ids += ids
        self._learned += [learn] * len(ids)
        span = np.arange(self._next, self._next + len(ids), dtype=np.int64)
        self._positions.append(np.broadcast_to(span, (3, len(ids))))
        self._next += len(ids)

    def picture(self, code: PictureCode) -> None:
        self._pictures.append(code)
        self.text(f"Picture {len(self._pictures)}: <|vision_start|>")
        positions = picture_positions(*code.grid)
        self._ids += [self._image_pad] * positions.shape[1]
        self._learned += [False] * positions.shape[1]
        self._positions.append(positions + self._next)
        self._next += max(code.grid) // MERGE
        self.text("<|vision_end|>")

    def finish(self) -> ConversationCode:
        ids = np.array(self._ids, dtype=np.int64)
        targets = np.full_like(ids, IGNORED)
        learned = np.array(self._learned[1:])
        targets[:-1][learned] = ids[1:][learned]
        positions = np.concatenate(self._positions, axis=1)
        matches = np.zeros_like(ids)
        matches[list(self._matches)] = list(self._matches.values())
        tallies = np.zeros((len(ids), MAX_PICTURES), dtype=np.int64)
        for at, counts in self._tallies.items():
            tallies[at] = counts
        return ConversationCode(ids, targets, positions, matches, tallies, tuple(self._pictures))
