"""Sounds at the gateway: what reaches the workers, and what is refused."""

import base64
import re

import pytest

from services.gateway.model import ServedModel
from services.gateway.settings import GatewaySettings, MediaSettings
from shared.messages.control import Role
from tests.support.audio_folders import build_audio_folder, encoded_file, wav_file

from .conftest import MODEL, picture_url, question, with_pictures
from .test_refusals import check
from .test_videos import video_part

WAV, MP3 = wav_file(12_347), encoded_file("mp3", "libmp3lame", 20_011, rate_hz=44_100)
INPUT_FIELD = "messages[0].content[0].input_audio.data"
URL_FIELD = "messages[0].content[0].audio_url.url"


@pytest.fixture(scope="session")
def hearing(tmp_path_factory) -> ServedModel:
    return ServedModel.load(MODEL, build_audio_folder("", tmp_path_factory.mktemp("audio")))


@pytest.fixture
def start_hearing(hearing, start):
    return lambda **options: start(served=hearing, **options)


def input_audio(data=WAV, kind="wav"):
    encoded = base64.b64encode(data).decode()
    return {"type": "input_audio", "input_audio": {"data": encoded, "format": kind}}


def audio_url(data=MP3):
    url = "data:audio/mpeg;base64," + base64.b64encode(data).decode()
    return {"type": "audio_url", "audio_url": {"url": url}}


def with_parts(*parts):
    body = question()
    body["messages"][0]["content"] = [*parts, {"type": "text", "text": "What?"}]
    return body


async def test_sounds_become_runs_in_order(start_hearing):
    async with start_hearing() as system:
        response = await system.post(with_parts(input_audio(), audio_url(), input_audio()))
        assert response.status_code == 200, response.text
        (request,) = system.workers.requests
        audio = system.workers.model.spec.audio
        first, second, third = request.media
        assert {item.kind for item in request.media} == {"audio"}
        for item in request.media:
            assert set(request.prompt_token_ids[item.offset : item.stop]) == {audio.audio_token_id}
        layout = audio.sizing.measure(12_347)
        assert (first.grid_thw, first.num_tokens) == (layout.grid_thw, layout.num_tokens)
        assert 0 < second.num_tokens < first.num_tokens
        assert third.content_key == first.content_key != second.content_key
        # The same sound twice is embedded once.
        assert sorted(task.item.content_key for task in system.workers.encode_tasks) == sorted(
            {first.content_key, second.content_key}
        )


@pytest.mark.parametrize(
    ("part", "param", "words"),
    [
        (input_audio(wav_file(48_001)), INPUT_FIELD, "lasts more than 3 s, the limit"),
        (input_audio(wav_file(320)), INPUT_FIELD, "320 samples at 16000 Hz.*321 samples are the"),
        (input_audio(MP3[:40], "mp3"), INPUT_FIELD, "cannot be decoded"),
        (input_audio(b"GIF89a" * 9), INPUT_FIELD, "not a WAV, MP3, FLAC, Ogg, M4A file"),
        (
            audio_url(b"#EXTM3U\nhttp://127.0.0.1/a.ts\n"),
            URL_FIELD,
            "not a WAV, MP3, FLAC, Ogg, M4A file",
        ),
        (
            {"type": "input_audio", "input_audio": {"data": "ab?c", "format": "wav"}},
            INPUT_FIELD,
            "data refused: its base64 is damaged",
        ),
        (
            {"type": "audio_url", "audio_url": {"url": "http://example.org/a.wav"}},
            URL_FIELD,
            "not allowed; send a data: URL",
        ),
    ],
)
async def test_bad_sounds(start_hearing, part, param, words):
    async with start_hearing() as system:
        error = check_match(await system.post(with_parts(part)), param, words)
        assert error["code"] == "bad_audio"
        assert system.workers.requests == []


def check_match(response, param, words):
    error = check(response, 400, param=param)
    assert re.search(words, error["message"]), error
    return error


async def test_limits(start_hearing):
    small = GatewaySettings(media=MediaSettings(max_audio_clips=1, max_audio_bytes=20_000))
    async with start_hearing(settings=small) as system:
        error = check(
            await system.post(with_parts(input_audio(), audio_url())),
            400,
            param="messages",
            words="2 audio clips were sent, the limit is 1",
        )
        assert error["code"] == "too_many_audio_clips"
        check(
            await system.post(with_parts(input_audio())),
            400,
            param=INPUT_FIELD,
            words="24738 bytes, the limit is 20000",
        )


async def test_a_format_that_is_not_read(start_hearing):
    async with start_hearing() as system:
        check(
            await system.post(with_parts(input_audio(kind="amr"))),
            400,
            param="messages[0].content[0].input_audio.format",
            words="amr",
        )
        check(
            await system.post(with_parts({"type": "sound"})),
            400,
            param="messages[0].content[0]",
            words="text, image_url, video_url, audio_url or input_audio",
        )


async def test_media_that_the_model_does_not_read(start, start_hearing):
    async with start() as system:
        for part, field in ((input_audio(), INPUT_FIELD), (audio_url(), URL_FIELD)):
            error = check(
                await system.post(with_parts(part)), 400, param=field, words="reads no audio clips"
            )
            assert error["code"] == "unsupported_media"
    async with start_hearing() as system:
        check(
            await system.post(with_pictures(picture_url())),
            400,
            param="messages[0].content[0].image_url.url",
            words="(model_type='qwen2_audio') reads no pictures",
        )
        check(
            await system.post(with_parts(video_part())),
            400,
            param="messages[0].content[0].video_url.url",
            words="reads no videos",
        )
        assert system.workers.requests == []


async def test_an_encoder_is_needed_for_sounds_only(start_hearing):
    async with start_hearing() as system:
        system.workers.missing = {Role.ENCODE}
        check(await system.post(with_parts(input_audio())), 503, words="encode")
        assert (await system.post(question("only text"))).status_code == 200
