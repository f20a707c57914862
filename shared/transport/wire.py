"""What owner and receiver say to each other: tags, control messages and the reply header.

In and out: bytes. A control message is msgpack of at most 8 KiB; a reply header has a fixed size.
Nothing that a peer sent is trusted: what does not parse is a `ProtocolError`. Knows no UCX.

A tag is 8 bits of kind and 56 bits of the receiver's pull number, so a reply finds its pull.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgpack
from pydantic import Field, ValidationError

from shared.errors import Outcome, ProtocolError, TransferError
from shared.messages.base import Message
from shared.messages.descriptor import WorkerRef

PROTOCOL_VERSION = 1
MAX_CONTROL_BYTES = 8 * 1024
HEADER_BYTES = 160

CONTROL_TAG = 0x01 << 56
HEADER_TAG = 0x02 << 56
DATA_TAG = 0x03 << 56
KIND_MASK = 0xFF << 56
PULL_MASK = (1 << 56) - 1
EVERY_BIT = (1 << 64) - 1

PullNumber = Annotated[int, Field(ge=0, le=PULL_MASK)]


class PullRequest(Message):
    """Send this segment: a header under `HEADER_TAG | number`, the bytes under `DATA_TAG | number`.

    `timeout_s` is how long the receiver will accept it, counted from now.
    """

    kind: Literal["pull"] = "pull"
    number: PullNumber
    sender: WorkerRef
    address: bytes
    owner: WorkerRef
    compatibility: Annotated[str, Field(max_length=512)]
    lease_id: Annotated[str, Field(max_length=160)]
    segment: Annotated[int, Field(ge=0)]
    num_bytes: Annotated[int, Field(ge=1)]
    timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)]


class AbandonNotice(Message):
    """The receiver gave this pull up; do not start to send it."""

    kind: Literal["abandon"] = "abandon"
    number: PullNumber
    sender: WorkerRef


class ReleaseNotice(Message):
    """One holder of a lease is done with it."""

    kind: Literal["release"] = "release"
    owner: WorkerRef
    lease_id: Annotated[str, Field(max_length=160)]
    holder: Annotated[str, Field(max_length=160)]


Control = PullRequest | AbandonNotice | ReleaseNotice
_KINDS: dict[str, type[Control]] = {
    "pull": PullRequest,
    "abandon": AbandonNotice,
    "release": ReleaseNotice,
}


@dataclass(frozen=True)
class ForeignRequest:
    """A pull request of another protocol version: enough of it to be refused."""

    version: int
    number: int
    sender: WorkerRef
    address: bytes


def encode_control(message: Control) -> bytes:
    """Pack a control message. Raises `ProtocolError` if it is too large."""
    body = message.model_dump(mode="python")
    data: bytes = msgpack.packb({"v": PROTOCOL_VERSION, **body}, use_bin_type=True)
    if len(data) > MAX_CONTROL_BYTES:
        raise ProtocolError(f"{len(data)} bytes of control, the limit is {MAX_CONTROL_BYTES}")
    return data


def decode_control(data: bytes) -> Control | ForeignRequest:
    """Unpack a control message. Raises `ProtocolError`."""
    try:
        body = msgpack.unpackb(data, raw=False, max_ext_len=0)
        if not isinstance(body, dict):
            raise ProtocolError(f"{type(body).__name__} received where a message was expected")
        version = body.pop("v", None)
        if version != PROTOCOL_VERSION:
            return _foreign(version, body)
        kind = _KINDS.get(body.get("kind", ""))
        if kind is None:
            raise ProtocolError(f"control message of unknown kind {body.get('kind')!r}")
        return kind.model_validate(body)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ProtocolError(f"malformed control message: {error}") from error


def _foreign(version: object, body: dict[str, Any]) -> ForeignRequest:
    """What every version keeps: a pull request names its number, its sender and its address."""
    number, address = body.get("number"), body.get("address")
    if (
        body.get("kind") != "pull"
        or not isinstance(version, int)
        or not isinstance(number, int)
        or not 0 <= number <= PULL_MASK
        or not isinstance(address, bytes)
    ):
        raise ProtocolError(f"control message of version {version!r}, expected {PROTOCOL_VERSION}")
    try:
        sender = WorkerRef.model_validate(body.get("sender"))
    except ValidationError as error:
        raise ProtocolError(f"malformed sender: {error}") from error
    return ForeignRequest(version, number, sender, address)


_HEADER = struct.Struct("<HHQ")
_CODES: dict[Outcome | None, int] = {
    None: 0,
    Outcome.NOT_READY: 1,
    Outcome.MISSING: 2,
    Outcome.INCOMPATIBLE: 3,
    Outcome.VERSION: 4,
    Outcome.EXPIRED: 5,
    Outcome.CANCELLED: 6,
    Outcome.INTERNAL: 7,
}
_OUTCOMES = {code: outcome for outcome, code in _CODES.items()}


def encode_header(num_bytes: int, refusal: TransferError | None = None) -> bytes:
    """The owner's answer: the bytes follow, or why they do not."""
    outcome, detail = (refusal.outcome, refusal.detail) if refusal else (None, "")
    text = detail.encode()[: HEADER_BYTES - _HEADER.size]
    head = _HEADER.pack(PROTOCOL_VERSION, _CODES[outcome], num_bytes)
    return (head + text).ljust(HEADER_BYTES, b"\0")


def check_header(data: bytes, num_bytes: int) -> None:
    """Return if `num_bytes` bytes will follow. Raises `TransferError` if they will not."""
    version, code, promised = _HEADER.unpack_from(data)
    if version != PROTOCOL_VERSION:
        raise TransferError(
            Outcome.VERSION, f"the owner speaks version {version}, this is {PROTOCOL_VERSION}"
        )
    if code not in _OUTCOMES:
        raise TransferError(Outcome.INTERNAL, f"the owner answered with unknown outcome {code}")
    outcome = _OUTCOMES[code]
    if outcome is not None:
        detail = data[_HEADER.size :].rstrip(b"\0").decode(errors="replace")
        raise TransferError(outcome, detail)
    if promised != num_bytes:
        raise TransferError(
            Outcome.INTERNAL, f"the owner promises {promised} bytes, {num_bytes} are awaited"
        )
