"""The command line of `triptych ask`, pictures and stream events, without a server."""

import base64
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.ask.client import chat_body
from services.ask.command import Question, main, parse, summary
from services.ask.errors import AnswerCut, BadPicture, ServerRefused
from services.ask.picture import data_url, media_type
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
        ([], "required: PICTURE ... QUESTION"),
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
        (b"RIFF\0\0\0\0WAVE", None),
        (b"", None),
    ],
)
def test_media_type(head: bytes, kind: str | None) -> None:
    assert media_type(head) == kind


def test_data_url(tmp_path: Path) -> None:
    picture = tmp_path / "misnamed.jpg"
    picture.write_bytes(PNG)
    assert data_url(picture) == "data:image/png;base64," + base64.b64encode(PNG).decode()


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "note.png"
    text.write_text("hello")
    with pytest.raises(BadPicture, match="not a PNG"):
        data_url(text)
    with pytest.raises(BadPicture, match="there is no such file"):
        data_url(tmp_path / "none.png")
    with pytest.raises(BadPicture, match="Is a directory"):
        data_url(tmp_path)


def test_chat_body_keeps_the_order() -> None:
    body = chat_body("m", ["data:1", "data:2"], "why?", None)
    assert body["messages"] == [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "data:1"}},
                {"type": "image_url", "image_url": {"url": "data:2"}},
                {"type": "text", "text": "why?"},
            ],
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
