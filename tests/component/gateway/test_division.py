"""A video at a gateway that sees several idle encoders, or one."""

from services.gateway.settings import GatewaySettings, MediaSettings
from shared.messages.control import Role
from shared.runtime.media_parts import parts_of
from tests.support.registrations import registered

from .conftest import picture_url, with_pictures
from .test_videos import video_part, with_parts

DIVIDING = GatewaySettings(media=MediaSettings(min_part_patches=1))


def outcome(system, name):
    labels = {"outcome": name}
    return system.parts.metrics.registry.get_sample_value(
        "triptych_request_embeddings_total", labels
    )


async def test_idle_encoders_share_a_video(start):
    async with start(settings=DIVIDING) as system:
        system.workers.registered = [
            registered("e0", Role.ENCODE),
            registered("ep", Role.ENCODE, Role.PREFILL),
            registered("e2", Role.ENCODE, ready=False),
            registered("d0", Role.DECODE),
        ]
        assert (await system.post(with_parts(video_part()))).status_code == 200
        await system.settle()
        (request,) = system.workers.requests
        (item,) = request.media
        parts = [task.part for task in system.workers.encode_tasks]
        assert sorted(parts, key=lambda part: part.index) == list(parts_of(item, 2))
        assert outcome(system, "divided") == 1


async def test_pictures_that_are_seen_whole_are_not_divided(start):
    async with start(settings=DIVIDING) as system:
        system.workers.registered = [registered(f"e{number}", Role.ENCODE) for number in range(5)]
        assert (await system.post(with_pictures(picture_url()))).status_code == 200
        await system.settle()
        assert [task.part for task in system.workers.encode_tasks] == [None]
        assert outcome(system, "queued") == 1


async def test_a_text_does_not_look_for_encoders(start, monkeypatch):
    async with start(settings=DIVIDING) as system:
        asked = []
        monkeypatch.setattr(system.workers, "live", lambda: asked.append(1) or [])
        assert (await system.post(with_parts())).status_code == 200
        await system.settle()
        assert len(system.workers.requests) == 1
        assert not asked


async def test_one_encoder_or_a_small_video_is_one_task(start):
    for settings, num_encoders in ((DIVIDING, 1), (GatewaySettings(), 5)):
        async with start(settings=settings) as system:
            system.workers.registered = [
                registered(f"e{number}", Role.ENCODE) for number in range(num_encoders)
            ]
            assert (await system.post(with_parts(video_part()))).status_code == 200
            await system.settle()
            assert [task.part for task in system.workers.encode_tasks] == [None]
