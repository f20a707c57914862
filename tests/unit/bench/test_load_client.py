"""The load's client believes nothing that is not a whole answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bench.delayed.load import Kind, send_all

NUM_TOKENS = 3


def event(**delta: str) -> bytes:
    return f"data: {json.dumps({'choices': [{'delta': delta}]})}\n\n".encode()


WHOLE = event(role="assistant") + NUM_TOKENS * event(content="!") + b"data: [DONE]\n\n"
CUT = event(content="!!") + b"data: [DONE]\n\n"
BROKEN = event(content="!") + b'data: {"error": {"message": "worker lost"}}\n\n'


class Handler(BaseHTTPRequestHandler):
    """Answers by the number of pictures in the request."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        num_pictures = len(body["messages"][0]["content"]) - 1
        self.send_response(503 if num_pictures == 3 else 200)
        self.end_headers()
        self.wfile.write((WHOLE, CUT, BROKEN, b"full")[num_pictures])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("num_pictures", "problem"),
    [(0, ""), (1, "2 of 3 tokens came"), (2, "worker lost"), (3, "HTTP 503: full")],
)
def test_only_a_whole_answer_counts(url: str, num_pictures: int, problem: str) -> None:
    kind = Kind("asked", num_pictures, 2, NUM_TOKENS)
    (outcome,) = send_all(url, [(0.0, kind)], seed=0)
    assert problem in outcome.error
    assert bool(outcome.error) == bool(problem)
    assert outcome.num_tokens == (0 if problem else NUM_TOKENS)


def test_time_counts_from_when_a_request_was_due(url: str) -> None:
    (outcome,) = send_all(url, [(0.05, Kind("asked", 0, 2, NUM_TOKENS))], seed=0)
    assert 0 < outcome.ttft_s <= outcome.latency_s < 10


def test_nobody_listening_is_a_lost_request() -> None:
    (outcome,) = send_all("http://127.0.0.1:9", [(0.0, Kind("asked", 0, 2, 1))], seed=0)
    assert outcome.error.startswith("ConnectError")
