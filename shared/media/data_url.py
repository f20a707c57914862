"""Base64 inside a request, mostly as `data:` URLs: the usual way for media to arrive."""

from __future__ import annotations

import base64
import binascii

from shared.errors import FailureKind, RequestFailed

_SCHEME = "data:"


def is_data_url(url: str) -> bool:
    """Schemes are case-insensitive (RFC 3986, section 3.1)."""
    return url[: len(_SCHEME)].lower() == _SCHEME


def decode_data_url(url: str, max_bytes: int) -> bytes:
    """The bytes of a base64 data URL. Raises `RequestFailed` (bad request).

    The media type is ignored: what the bytes are is decided by looking at them.
    """
    header, comma, payload = url.partition(",")
    if not comma or not is_data_url(header) or not header.lower().endswith(";base64"):
        raise _refused("it must look like data:image/png;base64,...")
    return _decoded(payload, max_bytes, "data URL")


def decode_base64(payload: str, max_bytes: int) -> bytes:
    """The bytes of plain base64 text. Raises `RequestFailed` (bad request)."""
    return _decoded(payload, max_bytes, "data")


def _decoded(payload: str, max_bytes: int, what: str) -> bytes:
    # Checked before decoding, so that an oversized payload is never held twice.
    num_bytes = len(payload) * 3 // 4
    if num_bytes > max_bytes + 2:
        raise _refused(f"it holds about {num_bytes} bytes, the limit is {max_bytes}", what)
    try:
        data = base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _refused(f"its base64 is damaged ({error})", what) from error
    if len(data) > max_bytes:
        raise _refused(f"it holds {len(data)} bytes, the limit is {max_bytes}", what)
    return data


def _refused(reason: str, what: str = "data URL") -> RequestFailed:
    return RequestFailed(FailureKind.BAD_REQUEST, f"{what} refused: {reason}")
