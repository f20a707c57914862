"""Messages to bytes and back: msgpack with a schema version, a type name and a size limit.

Nothing is ever unpickled. A message of another schema version is refused, not guessed at.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgpack
from pydantic import ValidationError

from shared.errors import ProtocolError
from shared.messages.base import Message

SCHEMA_VERSION = 4
MAX_MESSAGE_BYTES = 4 * 1024 * 1024

M = TypeVar("M", bound=Message)


def encode(message: Message) -> bytes:
    """Pack one message. Raises `ProtocolError` if it exceeds `MAX_MESSAGE_BYTES`."""
    envelope = {
        "v": SCHEMA_VERSION,
        "t": type(message).__name__,
        "b": message.model_dump(mode="python"),
    }
    data: bytes = msgpack.packb(envelope, use_bin_type=True, default=_plain)
    if len(data) > MAX_MESSAGE_BYTES:
        raise ProtocolError(
            f"{type(message).__name__} takes {len(data)} bytes on the wire, "
            f"the limit is {MAX_MESSAGE_BYTES}"
        )
    return data


def decode(data: bytes, kind: type[M]) -> M:
    """Unpack one message of the expected kind. Raises `ProtocolError` on anything else."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"{len(data)} bytes received, the limit is {MAX_MESSAGE_BYTES}")
    envelope = _unpack(data)
    if envelope.get("v") != SCHEMA_VERSION:
        raise ProtocolError(
            f"schema version {envelope.get('v')!r} received, this process speaks {SCHEMA_VERSION}"
        )
    if envelope.get("t") != kind.__name__:
        raise ProtocolError(f"{envelope.get('t')!r} received where {kind.__name__} was expected")
    try:
        return kind.model_validate(envelope.get("b"))
    except ValidationError as error:
        raise ProtocolError(f"malformed {kind.__name__}: {error}") from error


def _unpack(data: bytes) -> dict[str, Any]:
    try:
        envelope = msgpack.unpackb(data, raw=False, max_ext_len=0)
    except (ValueError, msgpack.UnpackException) as error:
        raise ProtocolError(f"not a msgpack message: {error}") from error
    if not isinstance(envelope, dict):
        raise ProtocolError(f"{type(envelope).__name__} received where an envelope was expected")
    return envelope


def _plain(value: object) -> object:
    if isinstance(value, str):  # StrEnum members
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot travel on the bus")
