import base64

import pytest

from shared.errors import RequestFailed
from shared.media.data_url import decode_data_url, is_data_url


def url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


@pytest.mark.parametrize("length", range(6))
def test_round_trip_up_to_the_limit(length):
    assert decode_data_url(url(b"x" * length), max_bytes=length) == b"x" * length
    with pytest.raises(RequestFailed, match="the limit is"):
        decode_data_url(url(b"x" * (length + 1)), max_bytes=length)


@pytest.mark.parametrize("bad", ["data:,hello", "data:image/png;base64", "image/png;base64,AA=="])
def test_only_base64_data_urls(bad):
    with pytest.raises(RequestFailed, match="must look like"):
        decode_data_url(bad, 100)


@pytest.mark.parametrize("payload", ["AAA", "A*==", "é===", "AA=A"])
def test_damaged_base64(payload):
    with pytest.raises(RequestFailed, match="damaged"):
        decode_data_url("data:image/png;base64," + payload, 100)


def test_the_scheme_is_case_insensitive():
    assert is_data_url("DATA:image/png;base64,AA==")
    assert not is_data_url("https://example.org/data:")
