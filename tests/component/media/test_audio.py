"""Sounds on their way in: which samples are read, and what is refused."""

from __future__ import annotations

import contextlib
import io

import av
import numpy as np
import pytest

from shared.errors import FailureKind, RequestFailed
from shared.media.audio import AudioLimits, format_of, read_audio
from tests.support.audio_folders import encoded_file, samples_of, wav_file, wave_values
from tests.support.vision_folders import picture_file

RATE_HZ = 16_000


def with_cover(flac: bytes, picture: bytes) -> bytes:
    """The file with a picture block in front of the others (RFC 9639, section 8.8)."""
    kind = b"image/png"
    body = (3).to_bytes(4, "big") + len(kind).to_bytes(4, "big") + kind + bytes(20)
    body += len(picture).to_bytes(4, "big") + picture
    # The stream's own block, 4 + 34 bytes, must stay the first.
    first = flac[4:42]
    is_last = first[0] & 0x80
    header = bytes([6 | is_last]) + len(body).to_bytes(3, "big")
    return flac[:4] + bytes([first[0] & 0x7F]) + first[1:] + header + body + flac[42:]


@pytest.mark.parametrize("num_samples", [1, 7, 321, 12_347, 480_000])
def test_a_file_at_the_wanted_rate_keeps_its_samples(num_samples: int) -> None:
    expected = (wave_values(num_samples)[:, 0] / 32_768).astype(np.float32)
    np.testing.assert_array_equal(samples_of(wav_file(num_samples)), expected)
    for container, codec in (("wav", "pcm_s32le"), ("wav", "pcm_f32le"), ("flac", "flac")):
        if num_samples > 1_000:
            data = encoded_file(container, codec, num_samples)
            np.testing.assert_array_equal(samples_of(data), expected)


def test_channels_are_mixed_evenly() -> None:
    both = wave_values(5_000, num_channels=2) / 32_768
    ours = samples_of(wav_file(5_000, num_channels=2))
    np.testing.assert_allclose(ours, both.mean(axis=1), atol=1e-6)


@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000])
def test_resampling_keeps_a_tone_and_its_duration(rate_hz: int) -> None:
    times = np.arange(rate_hz * 2 + 77) / rate_hz
    data = wav_of(np.sin(2 * np.pi * 440 * times), rate_hz)
    ours = samples_of(data)
    assert abs(len(ours) - len(times) * RATE_HZ / rate_hz) <= 2
    middle = slice(2_000, 30_000)
    expected = np.sin(2 * np.pi * 440 * np.arange(len(ours)) / RATE_HZ)
    np.testing.assert_allclose(ours[middle], expected[middle], atol=2e-2)


def wav_of(values: np.ndarray, rate_hz: int) -> bytes:
    header = wav_file(0, rate_hz=rate_hz)
    body = (values * 32_767).astype("<i2").tobytes()
    size = (len(body)).to_bytes(4, "little")
    return header[:4] + (36 + len(body)).to_bytes(4, "little") + header[8:40] + size + body


def test_mp3_gives_about_what_went_in() -> None:
    ours = samples_of(encoded_file("mp3", "libmp3lame", 20_000))
    assert 20_000 <= len(ours) <= 20_000 + 2 * 1_152
    assert 0.1 < np.abs(ours).max() < 1.1
    again = samples_of(encoded_file("mp3", "libmp3lame", 20_000))
    np.testing.assert_array_equal(ours, again)


@pytest.mark.parametrize(
    ("container", "codec", "reader", "frame_samples"),
    [
        ("ogg", "libopus", "ogg", 960),
        ("ipod", "aac", "mov", 1_024),
        ("ipod", "alac", "mov", 0),
    ],
)
def test_ogg_and_m4a_give_about_what_went_in(
    container: str, codec: str, reader: str, frame_samples: int
) -> None:
    data = encoded_file(container, codec, 20_000)
    assert format_of(data) == reader
    ours = samples_of(data)
    assert 20_000 <= len(ours) <= 20_000 + 2 * frame_samples
    assert 0.1 < np.abs(ours).max() < 1.1
    np.testing.assert_array_equal(ours, samples_of(data))
    if not frame_samples:
        np.testing.assert_array_equal(ours, samples_of(wav_file(20_000)))


def test_a_clip_is_heard_and_its_pictures_are_not_looked_at() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        picture = output.add_stream("mpeg4", rate=5, width=64, height=64, pix_fmt="yuv420p")
        sound = output.add_stream("alac", rate=RATE_HZ, layout="mono", format="s16p")
        for _ in range(5):
            output.mux(picture.encode(av.VideoFrame(64, 64, "yuv420p")))
        output.mux(picture.encode(None))
        values = np.ascontiguousarray(wave_values(4_000).T)
        frame = av.AudioFrame.from_ndarray(values, "s16p", "mono")
        frame.sample_rate = RATE_HZ
        output.mux(sound.encode(frame))
        output.mux(sound.encode(None))
    np.testing.assert_array_equal(samples_of(buffer.getvalue()), samples_of(wav_file(4_000)))


def test_a_cover_is_not_looked_at() -> None:
    flac = encoded_file("flac", "flac", 9_000)
    for cover in (picture_file(9, 9), picture_file(9, 9)[:30]):
        covered = with_cover(flac, cover)
        np.testing.assert_array_equal(samples_of(covered), samples_of(flac))


def test_formats_by_their_first_bytes() -> None:
    assert format_of(wav_file(5)) == "wav"
    assert format_of(encoded_file("flac", "flac", 2_000)) == "flac"
    mp3 = encoded_file("mp3", "libmp3lame", 2_000)
    assert format_of(mp3) == "mp3"
    assert mp3[:3] == b"ID3"
    tag_bytes = 10 + int.from_bytes(mp3[6:10], "big")  # each byte holds seven bits: a short tag
    assert format_of(mp3[tag_bytes:]) == "mp3"
    assert format_of(b"RIFF1234WEBPVP8 ") is None
    assert [format_of(data) for data in (b"", b"\xff", b"Oggs", b"#EXTM3U")] == [None] * 4


def damaged(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(200) + data[middle + 200 :]


FLAC = encoded_file("flac", "flac", 40_000)
MP3 = encoded_file("mp3", "libmp3lame", 40_000)
OPUS = encoded_file("ogg", "libopus", 40_000)
AAC = encoded_file("ipod", "aac", 40_000)


@pytest.mark.parametrize(
    ("data", "limits", "words"),
    [
        (picture_file(8, 8), AudioLimits(), "not a WAV, MP3, FLAC, Ogg, M4A file"),
        (b"#EXTM3U\nhttp://127.0.0.1/a.ts\n", AudioLimits(), "not a WAV, MP3, FLAC, Ogg, M4A file"),
        (wav_file(100)[:30], AudioLimits(), "cannot be decoded"),
        (wav_file(0), AudioLimits(), "audio refused"),
        (MP3[:40], AudioLimits(), "cannot be decoded"),
        (b"ID3" + bytes(60), AudioLimits(), "cannot be decoded"),
        (FLAC[: len(FLAC) // 2], AudioLimits(), "audio refused"),
        (damaged(FLAC), AudioLimits(), "audio refused"),
        (encoded_file("wav", "adpcm_ima_wav", 9_000), AudioLimits(), "codec 'adpcm_ima_wav' is no"),
        (wav_file(9_000, rate_hz=1_000), AudioLimits(), "1000 samples a second.* 4000 and 192000"),
        (wav_file(900, num_channels=9), AudioLimits(), "audio refused"),
        (wav_file(900, num_channels=6), AudioLimits(max_channels=2), "6 channels, the limit is 2"),
        (wav_file(900), AudioLimits(max_bytes=100), "1844 bytes, the limit is 100"),
        (wav_file(480_001), AudioLimits(), "lasts more than 30 s, the limit"),
        (wav_file(100_000, rate_hz=8_000), AudioLimits(max_duration_s=12.0), "more than 12 s"),
        (MP3, AudioLimits(max_duration_s=1.0), "lasts more than 1 s"),
    ],
)
def test_bad_sounds_are_refused(data: bytes, limits: AudioLimits, words: str) -> None:
    with pytest.raises(RequestFailed, match=words) as raised:
        read_audio(data, RATE_HZ, limits)
    assert raised.value.kind is FailureKind.BAD_REQUEST


def test_samples_that_are_no_numbers_are_refused() -> None:
    data = bytearray(encoded_file("wav", "pcm_f32le", 2_000))
    data[-4:] = np.array(np.nan, "<f4").tobytes()
    with pytest.raises(RequestFailed, match="no finite numbers"):
        samples_of(bytes(data))


def test_random_bytes_behind_good_beginnings_never_crash() -> None:
    rng = np.random.default_rng(0)
    for source in (wav_file(3_000), FLAC, MP3, OPUS, AAC):
        for _ in range(25):
            data = bytearray(source[: int(rng.integers(20, len(source)))])
            for place in rng.integers(12, len(data), 6):
                data[place] = int(rng.integers(0, 256))
            with contextlib.suppress(RequestFailed):
                assert len(samples_of(bytes(data)))
