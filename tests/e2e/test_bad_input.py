"""Bad input is refused at the gateway with an error that helps, and no worker hears of it."""

from __future__ import annotations

import base64
import random
from typing import Any

import httpx
import pytest

from bench.client import chat_body, data_url
from examples.plates.draw import draw
from examples.plates.specs import plate_spec
from tests.support.cluster import Cluster
from tests.support.mixed import png

GOOD = png(draw(plate_spec(random.Random(1), 57)))


def picture(url: str) -> list[dict[str, Any]]:
    part = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}]


def text(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


CASES: dict[str, tuple[dict[str, Any], int, str]] = {
    "unknown model": ({"model": "gpt-5"}, 404, "gpt-5"),
    "no messages": ({"messages": []}, 400, "messages"),
    "wrong type": ({"temperature": "hot"}, 400, "temperature"),
    "out of range": ({"temperature": 9}, 400, "temperature"),
    "bad max_tokens": ({"max_tokens": 0}, 400, "max_tokens"),
    "bad top_p": ({"top_p": 0}, 400, "top_p"),
    "too many choices": ({"n": 17}, 400, "n"),
    "unknown role": ({"messages": [{"role": "ghost", "content": "x"}]}, 400, "role"),
    "context": ({"messages": text("word " * 20_000)}, 400, "4096"),
    "too many tokens": ({"max_tokens": 100_000}, 400, "max_tokens"),
    "not a picture": ({"messages": picture(data_url(b"hello"))}, 400, "picture"),
    "truncated": ({"messages": picture(data_url(GOOD[: len(GOOD) // 2]))}, 400, "picture"),
    "not base64": ({"messages": picture("data:image/png;base64,!!!")}, 400, "base64"),
    "remote": ({"messages": picture("https://example.com/x.png")}, 400, "remote"),
    "local file": ({"messages": picture("file:///etc/passwd")}, 400, "url"),
    "too many": ({"messages": picture(data_url(GOOD)) * 40}, 400, "pictures"),
}


def worked(cluster: Cluster) -> float:
    """Tasks that any worker has taken so far."""
    return sum(
        worker.metric("triptych_request_queue_time_seconds_count")
        for service in ("encoder", "prefill", "decode")
        for worker in cluster.workers(service)
    )


@pytest.mark.parametrize("name", CASES)
def test_is_refused_with_field_and_reason(
    name: str, client: httpx.Client, cluster: Cluster
) -> None:
    change, status, says = CASES[name]
    before = worked(cluster)
    body = {**chat_body(cluster.model, [], "hello"), **change}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert says.lower() in (error["message"] + str(error["param"])).lower()
    assert "Traceback" not in response.text
    assert worked(cluster) == before


def test_broken_json(client: httpx.Client) -> None:
    response = client.post(
        "/v1/chat/completions", content="{", headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
    assert "JSON" in response.json()["error"]["message"]


def test_an_oversized_body_is_refused_before_it_is_read(client: httpx.Client) -> None:
    large = base64.b64encode(bytes(80 * 1024 * 1024)).decode()
    response = client.post("/v1/chat/completions", content=large)
    assert response.status_code == 413
    assert "limit" in response.json()["error"]["message"]


def test_the_server_still_answers(client: httpx.Client, cluster: Cluster) -> None:
    response = client.post("/v1/chat/completions", json=chat_body(cluster.model, [], "hello"))
    assert response.status_code == 200
