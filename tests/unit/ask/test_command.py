"""The command line of `triptych ask`, files of media and stream events, without a server."""

import base64
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.ask.client import chat_body
from services.ask.command import Question, main, parse, summary
from services.ask.errors import AnswerCut, BadMedium, ServerRefused
from services.ask.medium import media_type, part
from services.ask.sse import Piece, piece_of, pieces
from shared.errors import SettingsError

PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 8


def test_pictures_come_before_the_question() -> None:
    assert parse(["a.png", "b.png", "What changed?", "--max-tokens", "5"]) == Question(
        (Path("a.png"), Path("b.png")), "What changed?", max_tokens=5
    )
    assert parse(["Hello."]) == Question((), "Hello.")


def test_a_forgotten_question_is_noticed(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(PNG)
    with pytest.raises(SettingsError, match=r"the question is missing: .*a\.png"):
        parse([str(picture)])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["q", "--max-tokens", "0"], "--max-tokens = 0: should be at least 1"),
        (["q", "--modl", "x"], "did you mean --model?"),
        ([], "required: FILE ... QUESTION"),
        (["nowhere.PNG"], "the question is missing: it goes last, where 'nowhere.PNG' is"),
        (["a.png", " "], "the question is empty"),
        (["q", "--url", "localhost:8000"], "'localhost:8000': should begin with http://"),
    ],
)
def test_mistakes_are_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (PNG, "image/png"),
        (b"\xff\xd8\xff\xe0", "image/jpeg"),
        (b"GIF89a", "image/gif"),
        (b"BM1234", "image/bmp"),
        (b"RIFF\0\0\0\0WEBP", "image/webp"),
        (b"RIFF\0\0\0\0WAVE", "audio/wav"),
        (b"RIFF\0\0\0\0AVI ", "video/x-msvideo"),
        (b"RIFF\0\0\0\0CDDA", None),
        (b"\0\0\0\x20ftypisom", "video/mp4"),
        (b"\0\0\0\x20ftypM4A ", "audio/mp4"),
        (b"\x1a\x45\xdf\xa3", "video/webm"),
        (b"ID3\4\0", "audio/mpeg"),
        (b"\xff\xfb\x90\0", "audio/mpeg"),
        (b"fLaC", "audio/flac"),
        (b"OggS", "audio/ogg"),
        (b"\xff", None),
        (b"", None),
    ],
)
def test_media_type(head: bytes, kind: str | None) -> None:
    assert media_type(head) == kind


def test_a_file_becomes_the_part_of_its_kind(tmp_path: Path) -> None:
    picture = tmp_path / "misnamed.jpg"
    picture.write_bytes(PNG)
    url = "data:image/png;base64," + base64.b64encode(PNG).decode()
    assert part(picture) == {"type": "image_url", "image_url": {"url": url}}
    sound = tmp_path / "a.wav"
    sound.write_bytes(b"RIFF\0\0\0\0WAVE")
    url = "data:audio/wav;base64," + base64.b64encode(sound.read_bytes()).decode()
    assert part(sound) == {"type": "audio_url", "audio_url": {"url": url}}


def test_what_no_model_sees_or_hears_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "note.png"
    text.write_text("hello")
    with pytest.raises(BadMedium, match="not a picture"):
        part(text)
    with pytest.raises(BadMedium, match="there is no such file"):
        part(tmp_path / "none.png")
    with pytest.raises(BadMedium, match="Is a directory"):
        part(tmp_path)


def test_chat_body_keeps_the_order() -> None:
    media: list[dict[str, object]] = [
        {"type": "image_url", "image_url": {"url": "data:1"}},
        {"type": "audio_url", "audio_url": {"url": "data:2"}},
    ]
    body = chat_body("m", media, "why?", None)
    assert body["messages"] == [
        {
            "role": "user",
            "content": [*media, {"type": "text", "text": "why?"}],
        }
    ]
    assert "max_tokens" not in body
    assert chat_body("m", [], "why?", 7)["max_tokens"] == 7


@pytest.mark.parametrize(
    ("data", "piece"),
    [
        ('{"choices":[{"delta":{"role":"assistant"}}]}', Piece("")),
        ('{"choices":[{"delta":{"content":"57"}}]}', Piece("57")),
        ('{"choices":[{"delta":{},"finish_reason":"stop"}]}', Piece("", "stop")),
        ('{"choices":[],"usage":{"completion_tokens":4}}', Piece("", None, 4)),
    ],
)
def test_stream_events(data: str, piece: Piece) -> None:
    assert piece_of(data) == piece


def test_an_error_inside_the_stream_is_raised() -> None:
    with pytest.raises(ServerRefused, match="the server gave up: worker lost"):
        piece_of('{"error":{"message":"worker lost","type":"server_error"}}')


async def _lines(*lines: str) -> AsyncIterator[str]:
    for line in lines:
        yield line


async def test_a_stream_that_breaks_off_is_not_an_answer() -> None:
    lines = _lines('data: {"choices":[{"delta":{"content":"5"}}]}', "", "data: [DONE]")
    with pytest.raises(AnswerCut):
        [piece async for piece in pieces(lines)]


def test_summary() -> None:
    assert summary(0.052, 0.0971, 4, "stop") == (
        "4 tokens, first after 52 ms, all after 97 ms, ended by stop"
    )
    assert summary(None, 0.01, None, "length") == "all after 10 ms, ended by length"
