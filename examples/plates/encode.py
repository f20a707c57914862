"""Conversations to arrays: token ids, what to learn, and where to look."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from examples.plates.architecture import MERGE
from examples.plates.asks import Turn
from examples.plates.picture_code import IntArray, PictureCode, encode_picture, picture_positions
from examples.plates.questions import Conversation
from examples.plates.specs import PlateSpec, Spec

IGNORED = -100


@dataclass(frozen=True, eq=False)
class Gaze:
    """Pairs of a token and one that it is to look at; in a batch each after the number of its
    conversation."""

    looks: IntArray  # [looks, 2]: a place that shows what comes next
    tallies: IntArray  # [tallies, 2]: a thing that counts, or the begin of its picture
    reads: IntArray  # [reads, 2]: a digit of the question


NOWHERE = Gaze(*(np.zeros((0, 2), dtype=np.int64) for _ in range(3)))


@dataclass(frozen=True, eq=False)
class ConversationCode:
    """One conversation as the model reads it."""

    ids: IntArray  # [tokens]
    targets: IntArray  # [tokens]: the next token where it is to be learned, else IGNORED
    positions: IntArray  # [3, tokens]: M-RoPE's time, height, width
    matches: IntArray  # [tokens]: see `_Writer.match`
    gaze: Gaze  # see `_Writer.answer`
    pictures: tuple[PictureCode, ...]


def without_text(picture: PictureCode) -> ConversationCode:
    """A picture alone, to train the vision tower on."""
    nothing, positions = np.zeros(0, dtype=np.int64), np.zeros((3, 0), dtype=np.int64)
    return ConversationCode(nothing, nothing, positions, nothing, NOWHERE, (picture,))


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

    def encode(self, chat: Conversation) -> ConversationCode:
        """The conversation in the chat template's words; every answer and its end are to be
        learned."""
        writer = _Writer(self._tokenizer, self._image_pad)
        if chat.system is not None:
            writer.text(f"<|im_start|>system\n{chat.system}<|im_end|>\n")
        asked_from = 0
        for turn in chat.turns:
            writer.text("<|im_start|>user\n")
            if turn.pictures:
                asked_from = writer.pictures
            for spec in turn.pictures:
                writer.picture(encode_picture(spec))
            begin = writer.length
            writer.text(f"{turn.question}<|im_end|>\n<|im_start|>assistant\n")
            digits = writer.match(begin, chat.specs) if turn.kind == "which picture" else []
            writer.answer(turn, asked_from, digits)
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
        self._picture_tokens: list[IntArray] = []
        self._matches: dict[int, int] = {}
        self._looks: list[tuple[int, int]] = []
        self._tallies: list[tuple[int, int]] = []
        self._reads: list[tuple[int, int]] = []

    @property
    def length(self) -> int:
        """Tokens so far."""
        return len(self._ids)

    @property
    def pictures(self) -> int:
        """Pictures so far."""
        return len(self._pictures)

    def match(self, begin: int, shown: tuple[Spec, ...]) -> list[int]:
        """Notes, for the number asked for in the tokens from `begin`, which pictures it fits: at
        each digit those with that digit in that place, after the number those that show just it.
        Each digit also looks at the digits of the pictures that it fits.

        A token's note is 0 for none, else 1 + the bits of the pictures it fits + 16 times the bits
        of all pictures. Returns the tokens that it noted.
        """
        numbers = [str(spec.number) if isinstance(spec, PlateSpec) else "" for spec in shown]
        everywhere = 16 * (2 ** len(numbers) - 1)
        digits, noted = "", []
        for at in range(begin, len(self._ids)):
            word = self._tokenizer.decode([self._ids[at]]).strip()
            if word.isdigit():
                fits = [number[len(digits) :].startswith(word) for number in numbers]
                for picture in range(self.pictures):
                    if fits[picture]:
                        self._look(at, picture, (len(digits),))
                digits += word
            elif digits:
                fits = [number == digits for number in numbers]
            else:
                continue
            bits = sum(2**place for place, fit in enumerate(fits) if fit)
            self._matches[at] = 1 + bits + everywhere
            noted.append(at)
            if not word.isdigit():
                break
        return noted

    def answer(self, turn: Turn, asked_from: int, digits: list[int]) -> None:
        """Writes an answer, to be learned; every token of it, and its end, looks at what it says.
        Its pictures are those from number `asked_from` on. An answer that has no such place reads
        from `digits`, tokens of its question.

        A number of marks looks evenly at each of them and at the begin of its picture: so the share
        of that begin tells how many they are.
        """
        coded = self._tokenizer.encode(f"{turn.answer}<|im_end|>")
        for index, (_, end) in enumerate(coded.offsets):
            before = len(self._ids) + index - 1
            self._reads += [(before, digit) for digit in digits]
            if turn.looks:
                look = next((look for look in turn.looks if end <= look.end), turn.looks[-1])
                picture = asked_from + look.picture
                if look.counts and end <= look.end:
                    self._tally(before, picture, look.marks)
                else:
                    self._look(before, picture, look.marks)
        self.text(f"{turn.answer}<|im_end|>", learn=True)

    def _look(self, at: int, picture: int, marks: tuple[int, ...]) -> None:
        """Notes that the token at `at` looks at a picture: at these marks, or all over it."""
        tokens = self._marked(picture, marks) if marks else self._picture_tokens[picture]
        self._looks += [(at, int(token)) for token in tokens]

    def _tally(self, at: int, picture: int, marks: tuple[int, ...]) -> None:
        begin = self._picture_tokens[picture][0] - 1
        self._tallies += [(at, int(token)) for token in (begin, *self._marked(picture, marks))]

    def _marked(self, picture: int, marks: tuple[int, ...]) -> IntArray:
        """The tokens that hold these marks of a picture."""
        places = np.unique(self._pictures[picture].marks[list(marks)])
        return self._picture_tokens[picture][places]

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
        self._picture_tokens.append(np.arange(positions.shape[1]) + self.length)
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
        looks, tallies, reads = (
            np.array(found, dtype=np.int64).reshape(-1, 2)
            for found in (self._looks, self._tallies, self._reads)
        )
        gaze, pictures = Gaze(looks, tallies, reads), tuple(self._pictures)
        return ConversationCode(ids, targets, positions, matches, gaze, pictures)
