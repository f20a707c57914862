"""Control messages and headers: what a peer sends is never trusted."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import Outcome, ProtocolError, TransferError
from shared.messages.descriptor import WorkerRef
from shared.transport import wire

SENDER = WorkerRef(name="receiver", incarnation=3)
REQUEST = wire.PullRequest(
    number=5,
    sender=SENDER,
    address=b"\x00\xff" * 100,
    owner=WorkerRef(name="owner", incarnation=1),
    compatibility="model-a",
    lease_id="lease",
    segment=2,
    num_bytes=1 << 40,
    timeout_s=1.5,
)


@pytest.mark.parametrize(
    "message",
    [
        REQUEST,
        wire.AbandonNotice(number=5, sender=SENDER),
        wire.ReleaseNotice(owner=SENDER, lease_id="lease", holder="request"),
    ],
)
def test_round_trip(message: wire.Control) -> None:
    assert wire.decode_control(wire.encode_control(message)) == message


@given(st.binary(max_size=200))
def test_garbage_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        wire.decode_control(data)


@pytest.mark.parametrize(
    "change",
    [
        {"number": -1},
        {"number": 1 << 56},
        {"num_bytes": 0},
        {"timeout_s": float("nan")},
        {"timeout_s": float("inf")},
        {"sender": {"name": "../x", "incarnation": 1}},
        {"kind": "exec"},
        {"kind": ["pull"]},
        {"surplus": 1},
    ],
)
def test_malformed_fields(change: dict[str, object]) -> None:
    body = msgpack.unpackb(wire.encode_control(REQUEST)) | change
    with pytest.raises(ProtocolError):
        wire.decode_control(msgpack.packb(body))


def test_another_version_can_be_refused() -> None:
    body = msgpack.unpackb(wire.encode_control(REQUEST)) | {"v": 2, "novelty": True}
    foreign = wire.decode_control(msgpack.packb(body))
    assert foreign == wire.ForeignRequest(2, 5, SENDER, REQUEST.address)
    del body["address"]
    with pytest.raises(ProtocolError):
        wire.decode_control(msgpack.packb(body))


def test_control_is_bounded() -> None:
    with pytest.raises(ProtocolError, match="limit is 8192"):
        wire.encode_control(REQUEST.model_copy(update={"address": bytes(9000)}))


@pytest.mark.parametrize("outcome", list(Outcome))
def test_every_outcome_travels(outcome: Outcome) -> None:
    header = wire.encode_header(0, TransferError(outcome, "grün " * 100))
    assert len(header) == wire.HEADER_BYTES
    with pytest.raises(TransferError, match="grün") as failure:
        wire.check_header(header, 10)
    assert failure.value.outcome is outcome


def test_headers_are_checked() -> None:
    wire.check_header(wire.encode_header(10), 10)
    with pytest.raises(TransferError, match="promises 11 bytes, 10 are awaited"):
        wire.check_header(wire.encode_header(11), 10)
    with pytest.raises(TransferError) as failure:
        wire.check_header(b"\x09" + wire.encode_header(10)[1:], 10)
    assert failure.value.outcome is Outcome.VERSION
    with pytest.raises(TransferError, match="unknown outcome 99"):
        wire.check_header(b"\x01\x00\x63" + wire.encode_header(10)[3:], 10)
