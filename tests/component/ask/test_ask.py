"""The ask command against a stand-in for the gateway's HTTP."""

import io
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from services.ask.client import Client
from services.ask.command import Question, ask
from services.ask.errors import AnswerCut, ServerNotReachable, ServerRefused
from shared.runtime.access import Server

PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 8
ANSWER = """\
data: {"choices":[{"delta":{"role":"assistant","content":""}}]}

data: {"choices":[{"delta":{"content":"It says"}}]}

data: {"choices":[{"delta":{"content":" [57]."}}]}

data: {"choices":[{"delta":{},"finish_reason":"stop"}]}

data: {"choices":[],"usage":{"completion_tokens":3}}

data: [DONE]

"""
SPANS = [
    {"name": "request", "instance": "g", "start_unix_ns": 0, "end_unix_ns": 10_000_000},
    {"name": "queue.prefill", "instance": "p", "start_unix_ns": 0, "end_unix_ns": 5_000_000},
]


class Gateway:
    """Answers like the gateway; `stream` is what the chat says, `late` how often spans lack."""

    def __init__(self, stream: str = ANSWER, status: int = 200, late: int = 0) -> None:
        self.stream = stream
        self.status = status
        self.late = late
        self.body: dict[str, object] = {}
        self.keys: set[str | None] = set()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.keys.add(request.headers.get("authorization"))
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        if request.url.path == "/v1/traces/abc":
            self.late -= 1
            return httpx.Response(200, json=SPANS if self.late < 0 else SPANS[1:])
        self.body = json.loads(request.content)
        return httpx.Response(self.status, text=self.stream, headers={"x-trace-id": "abc"})


async def run(gateway: Gateway, question: Question) -> str:
    out = io.StringIO()
    client = Client(question.server, httpx.MockTransport(gateway))
    await ask(question, Console(file=out, width=80), client)
    return out.getvalue()


async def test_every_request_carries_the_key() -> None:
    gateway = Gateway()
    await run(gateway, Question((), "Hello", Server("http://g", "secret")))
    assert gateway.keys == {"Bearer secret"}
    gateway = Gateway()
    await run(gateway, Question((), "Hello"))
    assert gateway.keys == {None}


async def test_answer_summary_and_waterfall(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(PNG)
    gateway = Gateway(late=2)
    shown = (await run(gateway, Question((picture,), "Which number?"))).splitlines()
    assert shown[0] == "It says [57]."
    assert shown[1].startswith("3 tokens, first after ")
    assert [line.split()[0] for line in shown[2:4]] == ["request", "queue.prefill"]
    assert gateway.body["model"] == "m"
    assert gateway.body["stream"] is True


async def test_without_a_trace_the_answer_stands_alone() -> None:
    shown = await run(Gateway(), Question((), "Hello", shows_trace=False))
    assert len(shown.splitlines()) == 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"error":{"message":"queue is full"}}', "the server says 429: queue is full"),
        ("upstream down", "the server says 429: upstream down"),
    ],
)
async def test_the_servers_own_message_is_shown(body: str, message: str) -> None:
    with pytest.raises(ServerRefused, match=message):
        await run(Gateway(body, status=429), Question((), "Hello"))


async def test_a_cut_answer_is_an_error() -> None:
    with pytest.raises(AnswerCut):
        await run(Gateway(ANSWER.partition("data: {")[2][:0]), Question((), "Hello"))


async def test_nobody_listens() -> None:
    with pytest.raises(ServerNotReachable, match="start one with `triptych up`"):
        await ask(
            Question((), "Hello", server=Server("http://127.0.0.1:9")), Console(file=io.StringIO())
        )


def test_as_a_command_it_fails_in_one_line() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "services.cli", "ask", "Hello", "--url", "http://127.0.0.1:9"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: no server answers at http://127.0.0.1:9 (")
    assert result.stderr.count("\n") == 1


def test_ctrl_c_ends_a_question_that_nobody_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        command = [sys.executable, "-m", "services.cli", "ask", "Hello", "--url", url]
        with subprocess.Popen(command) as process:
            connection, _ = silent.accept()
            with connection:
                process.send_signal(signal.SIGINT)
                assert process.wait(timeout=20) == 130
