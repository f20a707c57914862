"""`triptych role` over a gateway that is played by a transport."""

from __future__ import annotations

import io

import httpx
import pytest
from rich.console import Console

from services.role.command import RoleError, Wish, carry_out, parse
from shared.errors import SettingsError
from shared.runtime.access import Server

URL = "http://gateway"


def run(wish: Wish, status: int, body: object) -> tuple[str, list[httpx.Request]]:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(status, json=body)

    out = io.StringIO()
    with httpx.Client(base_url=URL, transport=httpx.MockTransport(answer)) as client:
        carry_out(wish, client, Console(file=out, width=120))
    return out.getvalue(), seen


def test_a_switch_says_what_it_took() -> None:
    body = {
        "worker": "decode-1",
        "before": ["decode"],
        "after": ["prefill"],
        "drain_s": 0.3,
        "build_s": 0.1,
        "total_s": 0.42,
    }
    out, (request,) = run(Wish(Server(URL), "decode-1", "prefill", force=True), 200, body)
    assert "decode-1: decode -> prefill in 0.42 s" in out
    assert request.url.path == "/v1/roles/decode-1"
    assert request.read() == b'{"role":"prefill","force":true}'


def test_alone_it_lists_the_workers() -> None:
    worker = {
        "worker": "w-0", "stages": ["prefill", "decode"], "ready": False, "model": "m",
        "host": "h", "pid": 12,
    }  # fmt: skip
    out, _ = run(Wish(Server(URL)), 200, {"workers": [worker]})
    assert "w-0" in out
    assert "prefill decode" in out
    assert "busy" in out


@pytest.mark.parametrize(
    ("body", "message"),
    [({"error": {"message": "worker x: no"}}, "worker x: no"), ([], "gateway answered 409")],
)
def test_a_refusal_is_told_in_the_gateways_words(body: object, message: str) -> None:
    with pytest.raises(RoleError, match=message):
        run(Wish(Server(URL), "x", "decode"), 409, body)


@pytest.mark.parametrize("argv", [["one"], ["a", "b", "c"], ["--url", "gateway"]])
def test_a_wrong_command_line_is_refused(argv: list[str]) -> None:
    with pytest.raises(SettingsError):
        parse(argv)
