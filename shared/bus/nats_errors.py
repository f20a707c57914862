"""Translates what nats-py raises into `BusError` and its subclasses, once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import nats.errors
from nats.js.errors import APIError, NotFoundError

from shared.errors import BusError, QueueFull

# The server's own error codes: a stream refused to store, the whole server has no room, and a
# stream of that name exists with other settings.
_STORE_FAILED_CODE = 10077
_NO_ROOM_CODES = frozenset({10023, 10047})
_NAME_IN_USE_CODE = 10058


@contextmanager
def translated(operation: str) -> Iterator[None]:
    """Run one operation on the server; `operation` opens the message of whatever it raises."""
    try:
        yield
    except BusError:
        raise
    except (nats.errors.Error, TimeoutError, OSError) as error:
        raise _translate(operation, error) from error


def is_missing(error: BaseException) -> bool:
    """Whether the server said that a stream, message or key is not there."""
    return isinstance(error, NotFoundError)


def is_settings_conflict(error: BaseException) -> bool:
    """Whether a stream of that name exists with other settings."""
    return isinstance(error, APIError) and error.err_code == _NAME_IN_USE_CODE


def _translate(operation: str, error: Exception) -> BusError:
    if isinstance(error, APIError) and _is_full(error):
        return QueueFull(f"{operation}: full ({error.description})")
    detail = str(error) or type(error).__name__
    return BusError(f"{operation}: {detail}")


def _is_full(error: APIError) -> bool:
    # The store code covers every failure to store; only a limit is worth another try.
    if error.err_code == _STORE_FAILED_CODE:
        return "exceeded" in (error.description or "")
    return error.err_code in _NO_ROOM_CODES
