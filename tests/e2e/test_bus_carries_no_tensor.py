"""Whatever travels over NATS is read along: no embedding and no KV may be among it."""

from __future__ import annotations

import random
from pathlib import Path

import httpx
import nats
import pytest
import torch

from bench.accuracy import png
from bench.client import chat_body
from bench.prompts import PromptMaker
from examples.plates.draw import draw
from examples.plates.specs import plate_spec
from services.encoder.build import load_executor
from services.encoder.preprocess import PicturePreprocessor
from shared.demo import model_dir
from shared.media.picture import PictureLimits
from shared.modelspec import ModelSpec
from shared.runtime.host import ModelFolder
from tests.support.cluster import Cluster

WINDOW_BYTES = 64
LARGEST_MESSAGE_BYTES = 32 * 1024


def embedding_of(picture: bytes) -> torch.Tensor:
    spec = ModelSpec.load(model_dir())
    folder = ModelFolder(Path(model_dir()), spec, spec.dtype, "cpu")
    preprocess = PicturePreprocessor(folder.directory, PictureLimits())
    return load_executor(folder).run([preprocess(picture)])[0]


async def test_no_message_holds_a_tensor(cluster: Cluster, prompts: PromptMaker) -> None:
    rng = random.Random(99)
    picture = png(draw(plate_spec(rng, 8642)))
    heard: list[tuple[str, bytes]] = []
    connection = await nats.connect(cluster.nats_url)
    try:

        async def listen(message: nats.aio.msg.Msg) -> None:
            heard.append((message.subject, message.data))

        await connection.subscribe(">", cb=listen)
        await connection.flush()
        body = chat_body(cluster.model, [picture], "What is it?", max_tokens=8, ignore_eos=True)
        async with httpx.AsyncClient(timeout=60.0) as client:
            response = await client.post(f"{cluster.url}/v1/chat/completions", json=body)
        assert response.status_code == 200
        await connection.flush()
    finally:
        await connection.close()
    assert any(subject.startswith("events.") for subject, _ in heard), "nothing was heard"
    raw = embedding_of(picture).numpy().tobytes()
    windows = {raw[at : at + WINDOW_BYTES] for at in range(0, len(raw) - WINDOW_BYTES, 4096)}
    for subject, data in heard:
        media = "media" in subject.lower()
        assert media or len(data) < LARGEST_MESSAGE_BYTES, f"{subject} carried {len(data)} bytes"
        assert not any(window in data for window in windows), f"{subject} carried an embedding"


@pytest.mark.parametrize("tensor", [torch.zeros(4), torch.zeros(4).numpy()])
def test_the_codec_refuses_tensors(tensor: object) -> None:
    import msgpack

    from shared.messages.codec import _plain

    with pytest.raises(TypeError, match="cannot travel"):
        msgpack.packb({"tensor": tensor}, default=_plain)
