"""Videos at the gateway: what reaches the workers, and what is refused."""

import base64

from services.gateway.settings import GatewaySettings, MediaSettings
from tests.support.video_folders import clip_file

from .conftest import picture_url, question, with_pictures
from .test_refusals import check

CLIP = clip_file(20, size=(64, 96))
FIELD = "messages[0].content[0].video_url.url"


def video_part(data=CLIP):
    url = "data:video/mp4;base64," + base64.b64encode(data).decode()
    return {"type": "video_url", "video_url": {"url": url}}


def with_parts(*parts):
    body = question()
    body["messages"][0]["content"] = [*parts, {"type": "text", "text": "What?"}]
    return body


async def test_a_video_between_pictures_keeps_its_place(start):
    pictures = with_pictures(picture_url("red"), picture_url("blue"))["messages"][0]["content"]
    async with start() as system:
        response = await system.post(with_parts(pictures[0], video_part(), pictures[1]))
        assert response.status_code == 200, response.text
        (request,) = system.workers.requests
        vision = system.workers.model.spec.vision
        assert [item.kind for item in request.media] == ["image", "video", "image"]
        clip = request.media[1]
        ids = request.prompt_token_ids[clip.offset : clip.stop]
        assert set(ids) == {vision.video_token_id}
        assert len(ids) == clip.num_tokens == vision.num_tokens(clip.grid_thw)
        assert clip.grid_thw[0] == 2
        assert clip.seconds_per_frame == 1.0
        assert len({item.content_key for item in request.media}) == 3


async def test_refusals(start):
    small = GatewaySettings(media=MediaSettings(max_videos=1, max_video_frames=10))
    async with start(settings=small) as system:
        check(
            await system.post(with_parts(video_part(), video_part())),
            400,
            param="messages",
            words="2 videos were sent, the limit is 1",
        )
        error = check(await system.post(with_parts(video_part())), 400, param=FIELD, words="10 fra")
        assert error["code"] == "bad_video"
        check(
            await system.post(with_parts(video_part(b"GIF89a"))),
            400,
            param=FIELD,
            words="not a MP4",
        )
        assert system.workers.requests == []


async def test_a_video_where_a_picture_belongs_and_the_reverse(start):
    url = video_part()["video_url"]["url"]
    async with start() as system:
        response = await system.post(with_pictures(url))
        check(response, 400, param="messages[0].content[0].image_url.url", words="picture refused")
        png = base64.b64decode(picture_url().partition(",")[2])
        check(await system.post(with_parts(video_part(png))), 400, param=FIELD, words="not a MP4")
