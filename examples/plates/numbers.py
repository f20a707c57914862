"""Which numbers are trained on and which are kept back for the test.

A tenth of all three and four digit numbers never appears in training, chosen by a fixed hash, so
that a right answer about one of them shows that the model reads digits and has not learned numbers
by heart.
"""

from __future__ import annotations

import random

MAX_DIGITS = 4
HELD_OUT_SHARE = 10
"""One number in this many is held out."""


def is_held_out(number: int) -> bool:
    """True for the three and four digit numbers that training never sees (Knuth's multiplicative
    hash)."""
    return number >= 100 and (number * 2654435761 % 2**32 >> 16) % HELD_OUT_SHARE == 0


def draw_number(rng: random.Random, *, held_out: bool | None) -> int:
    """A number of 1 to 4 digits, each length equally likely.

    held_out: False gives only trained numbers, True only held-out ones (so 3 or 4 digits), None
    any.
    """
    while True:
        digits = rng.randint(3 if held_out else 1, MAX_DIGITS)
        number = rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)
        if held_out is None or is_held_out(number) == held_out:
            return number


def any_numbers(rng: random.Random, count: int) -> list[int]:
    """Trained numbers that have nothing to do with each other."""
    return [draw_number(rng, held_out=False) for _ in range(count)]


def alike_numbers(rng: random.Random, count: int) -> list[int]:
    """Different trained numbers that are easily mixed up: each has a digit more, less or other than
    one before it."""
    found = [draw_number(rng, held_out=False)]
    while len(found) < count:
        number = _changed(rng, str(rng.choice(found)))
        if number not in found and not is_held_out(number):
            found.append(number)
    return rng.sample(found, count)


def _changed(rng: random.Random, digits: str) -> int:
    """`digits` with one digit put in, left out or replaced; again a number of 1 to MAX_DIGITS."""
    at, digit = rng.randrange(len(digits)), str(rng.randrange(10))
    before, after = digits[:at], digits[at + 1 :]
    options = [before + digit + after]
    if len(digits) < MAX_DIGITS:
        options += [before + digit + digits[at:], digits + digit]
    if len(digits) > 1:
        options.append(before + after)
    return int(rng.choice(options))
