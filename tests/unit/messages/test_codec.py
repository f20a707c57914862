"""Bytes on the wire: what comes back, and what is refused."""

from __future__ import annotations

import msgpack
import pytest

from shared.errors import ProtocolError
from shared.messages import codec
from shared.messages.control import CancelRequest, Registration, Role
from shared.messages.descriptor import WorkerRef
from shared.messages.telemetry import SpanBatch, SpanRecord

CANCEL = CancelRequest(request_id="r1", attempt=2)
SPAN = SpanRecord(
    trace_id="a" * 32,
    span_id="b" * 16,
    parent_id=None,
    name="decode",
    service="decode",
    instance="decode-0",
    start_unix_ns=1_000_000_000,
    end_unix_ns=3_500_000_000,
    attributes={"flag": True, "count": 3, "share": 0.5, "name": "x"},
)


def packed(**changes: object) -> bytes:
    body = {"request_id": "r", "attempt": 0}
    envelope = {"v": codec.SCHEMA_VERSION, "t": "CancelRequest", "b": body, **changes}
    return bytes(msgpack.packb(envelope))


@pytest.mark.parametrize(
    "message",
    [
        CANCEL,
        Registration(
            worker=WorkerRef(name="w", incarnation=2**60),
            stages=(Role.PREFILL, Role.DECODE),
            model="m",
            compatibility="c",
            host="h",
            pid=1,
            ready=True,
            capacity={"blocks": 7},
        ),
        SpanBatch(spans=(SPAN,), num_dropped=4),
    ],
)
def test_a_message_comes_back_as_it_was(message: CancelRequest | Registration | SpanBatch) -> None:
    assert codec.decode(codec.encode(message), type(message)) == message


def test_attribute_types_survive() -> None:
    (span,) = codec.decode(codec.encode(SpanBatch(spans=(SPAN,))), SpanBatch).spans
    assert {k: type(v) for k, v in span.attributes.items()} == {
        "flag": bool, "count": int, "share": float, "name": str,
    }  # fmt: skip
    assert span.duration_s == 2.5


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "msgpack"),
        (b"\x01", "int received"),
        (packed(v=99), "schema version 99"),
        (packed(t="PrefillTask"), "'PrefillTask' received"),
        (packed(b={"request_id": "r"}), "malformed CancelRequest"),
        (packed(b={"request_id": "r", "attempt": 0, "more": 1}), "malformed CancelRequest"),
        (packed(b=msgpack.ExtType(1, b"x")), "msgpack"),
        (b"x" * (codec.MAX_MESSAGE_BYTES + 1), "limit"),
    ],
)
def test_anything_else_is_refused(data: bytes, complaint: str) -> None:
    with pytest.raises(ProtocolError, match=complaint):
        codec.decode(data, CancelRequest)


def test_a_message_above_the_limit_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match="limit"):
        codec.encode(CancelRequest(request_id="x" * codec.MAX_MESSAGE_BYTES, attempt=0))
