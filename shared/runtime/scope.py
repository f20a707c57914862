"""Structured concurrency whose failures read like ordinary ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unwrapped() -> Iterator[None]:
    """Raise the first failure of a task group as itself, not as a group of one.

    The other members were cancelled by the group; what they say on their way out is not the cause.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None
