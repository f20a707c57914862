"""Open-loop load for `planner_accuracy`, by a client that costs little: it shares the machine.

In: requests with their times. Out: when the first and the last token of each came, and where the
time went by the spans that the services export. One connection for each request, read as bytes.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil

from bench.planner_requests import Request
from services.planner.slo import Slo

SPANS_WAIT_S = 1.5
"""Processes publish their spans in batches, so the last ones come a little later."""
TIMEOUT_S = 300.0
GATEWAY = "services.gateway"
"""In the command line of a gateway."""


@dataclass(frozen=True)
class Served:
    """One answer. Seconds to the first token from when the request was due, to the last one, and
    for each after the first; infinite where it failed. `spans_s` as of `SimRequest`."""

    ttft_s: float = float("inf")
    latency_s: float = float("inf")
    tpot_s: float = float("inf")
    trace_id: str = ""
    spans_s: Mapping[str, float] = field(default_factory=dict)

    def is_good(self, slo: Slo) -> bool:
        """Whether both limits are kept."""
        return self.ttft_s <= slo.ttft_s and self.tpot_s <= slo.tpot_s


@dataclass(frozen=True)
class CpuSeconds:
    """Of a gateway, and of all processes with it."""

    gateway_s: float = 0.0
    total_s: float = 0.0

    def plus(self, other: CpuSeconds, times: float) -> CpuSeconds:
        """The other so many times more."""
        return CpuSeconds(
            self.gateway_s + times * other.gateway_s, self.total_s + times * other.total_s
        )


class OwnCpu:
    """CPU seconds of this process and all its children since it was made."""

    def __init__(self) -> None:
        self._processes = (psutil.Process(), *psutil.Process().children(recursive=True))
        self._gateways = [each for each in self._processes if GATEWAY in each.cmdline()]
        self._before = self._read()

    def seconds(self) -> CpuSeconds:
        """Since the beginning."""
        return self._read().plus(self._before, -1.0)

    def _read(self) -> CpuSeconds:
        return CpuSeconds(*(_cpu_s(each) for each in (self._gateways, self._processes)))


def _cpu_s(processes: Sequence[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return float(sum(each.user + each.system for each in times))


def send(url: str, load: Sequence[Request]) -> list[Served]:
    """Send every request at its time, whether or not those before it have ended."""
    return asyncio.run(_send(url, load))


async def _send(url: str, load: Sequence[Request]) -> list[Served]:
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    bodies = [json.dumps(each.body | streamed).encode() for each in load]
    begin_s = time.perf_counter() + 0.1
    work = [
        _ask(url, body, begin_s + each.arrival.arrival_s, each.arrival.num_output_tokens)
        for body, each in zip(bodies, load, strict=True)
    ]
    return await asyncio.gather(*work)


async def _ask(url: str, body: bytes, due_s: float, num_tokens: int) -> Served:
    await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
    address = urlsplit(url)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    try:
        async with asyncio.timeout(TIMEOUT_S):
            reader, writer = await asyncio.open_connection(address.hostname, address.port)
            try:
                writer.write(head.encode() + body)
                return await _read(reader, due_s, num_tokens)
            finally:
                writer.close()
    except (OSError, TimeoutError, ValueError):
        return Served()


async def _read(reader: asyncio.StreamReader, due_s: float, num_tokens: int) -> Served:
    """Raises `ValueError` where the answer is not whole."""
    first_s = last_s = 0.0
    trace_id, told = "", 0
    if b" 200 " not in await reader.readline():
        raise ValueError("refused")
    while line := await reader.readline():
        if line.lower().startswith(b"x-trace-id:"):
            trace_id = line.split(b":")[1].strip().decode()
        if not line.startswith(b"data: {"):
            continue
        now_s = time.perf_counter()
        event: dict[str, Any] = json.loads(line[6:])
        told = (event.get("usage") or {}).get("completion_tokens", told)
        for choice in event["choices"]:
            if choice["delta"].get("content"):
                first_s = first_s or now_s
            if choice.get("finish_reason"):
                last_s = now_s
    if told != num_tokens or not last_s:
        raise ValueError(f"{told} of {num_tokens} tokens came")
    first_s = first_s or last_s
    tpot_s = (last_s - first_s) / max(1, num_tokens - 1)
    return Served(first_s - due_s, last_s - due_s, tpot_s, trace_id)


def with_spans(url: str, served: Sequence[Served]) -> list[Served]:
    """The same, with the spans that the gateway has heard of; wait `SPANS_WAIT_S` before."""
    with httpx.Client(base_url=url, timeout=30.0, trust_env=False) as client:
        return [_with_spans(client, each) for each in served]


def _with_spans(client: httpx.Client, served: Served) -> Served:
    if not served.trace_id:
        return served
    answer = client.get(f"/v1/traces/{served.trace_id}")
    spans_s: dict[str, float] = {}
    for span in answer.json() if answer.status_code == 200 else ():
        seconds = (span["end_unix_ns"] - span["start_unix_ns"]) / 1e9
        spans_s[span["name"]] = spans_s.get(span["name"], 0.0) + seconds
    return replace(served, spans_s=spans_s)
