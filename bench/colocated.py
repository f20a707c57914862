"""From prefill to decode in one process, over shared blocks, and in two processes of one host.

All compute is real: the demo model. Two servers run side by side and answer the same kind of long
prompt in turn. The hand-over is what lies between the end of a prompt's prefill and the beginning
of its decode, by the request's own spans: in two processes that is a descriptor over NATS, the KV
over UCX and a copy into the decoder's blocks. Prints its median and the bytes that the transport
moved for each answer, the ratio last.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.progress import track

from bench.client import chat_body, forbid_end, stream
from bench.delayed.report import plot_bars, table
from bench.mixed_worker import LongPrompts
from bench.prompts import PromptMaker
from bench.server import running_server
from services.launcher.ports import free_ports
from shared.demo import model_dir
from shared.telemetry import names

TOPOLOGIES = {"one process": "1E 1PD", "two processes": "1E 1P 1D"}
NUM_WORKERS = 3
NUM_WARM_UP = 3
NS_PER_MS = 1e6
SPANS_TIMEOUT_S = 10.0


@dataclass
class Side:
    """One server; what it took and moved so far."""

    url: str
    first_metrics_port: int
    num_workers: int
    hand_overs_ms: list[float] = field(default_factory=list)
    second_tokens_ms: list[float] = field(default_factory=list)
    moved_bytes: float = 0.0


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m bench colocated", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="prompts of each side (20)")
    parser.add_argument("--prompt-tokens", type=int, default=2000, help="their length (2000)")
    parser.add_argument("--out", type=Path, help="write a plot into this PNG file")
    options = parser.parse_args()
    sides = measure(options.rounds, options.prompt_tokens)
    if options.out:
        plot_bars(
            options.out,
            ["end of prefill to begin of decode", "first token to second"],
            {
                name: [
                    statistics.median(side.hand_overs_ms),
                    statistics.median(side.second_tokens_ms),
                ]
                for name, side in sides.items()
            },
            title=f"Hand-over of a prompt of {options.prompt_tokens} tokens",
            y_label="median, ms",
            log_scale=True,
        )
    print(report(sides, options.rounds, options.prompt_tokens))


def measure(num_rounds: int, num_tokens: int) -> dict[str, Side]:
    """Ask both in turn."""
    prompts = LongPrompts(PromptMaker(model_dir()), num_tokens)
    with ExitStack() as scope:
        client = scope.enter_context(httpx.Client(timeout=120.0))
        sides = {}
        for name, topology in TOPOLOGIES.items():
            port = free_ports(NUM_WORKERS)
            arguments = ["--topology", topology, "--served-name", "bench", "--threads", "1"]
            arguments += ["--metrics-port", str(port)]
            url = scope.enter_context(running_server(arguments))
            sides[name] = Side(url, port, len(topology.split()))
        for number in track(range(-NUM_WARM_UP, num_rounds), "prompts"):
            for side in sides.values():
                if number == 0:
                    side.moved_bytes = -moved(client, side)
                ask(client, side, prompts.next(), is_measured=number >= 0)
        for side in sides.values():
            side.moved_bytes += moved(client, side)
    return sides


def ask(client: httpx.Client, side: Side, prompt: str, *, is_measured: bool) -> None:
    """One short answer, and when its stages began and ended."""
    # Without a grammar, for it is opened between prefill and decode and would be measured too.
    endless = forbid_end(model_dir())
    body = chat_body("bench", [], prompt, temperature=0, max_tokens=8, logit_bias=endless)
    timed = stream(client, side.url, body)
    hand_over_ms = hand_over_of(client, side.url, timed.trace_id)
    if is_measured:
        side.hand_overs_ms.append(hand_over_ms)
        if timed.gaps_s:  # not every token shows as text
            side.second_tokens_ms.append(1e3 * timed.gaps_s[0])


def hand_over_of(client: httpx.Client, url: str, trace_id: str) -> float:
    """Milliseconds from prefill's end to decode's begin; waits for the spans to arrive."""
    give_up_at = time.monotonic() + SPANS_TIMEOUT_S
    while time.monotonic() < give_up_at:
        spans: list[dict[str, Any]] = client.get(f"{url}/v1/traces/{trace_id}").json()
        by_name = {span["name"]: span for span in spans}
        if names.PREFILL in by_name and names.DECODE in by_name:
            began_ns = by_name[names.DECODE]["start_unix_ns"]
            ended_ns = by_name[names.PREFILL]["end_unix_ns"]
            return float(began_ns - ended_ns) / NS_PER_MS
        time.sleep(0.05)
    raise RuntimeError(f"trace {trace_id} has no prefill and decode after {SPANS_TIMEOUT_S:g} s")


def moved(client: httpx.Client, side: Side) -> float:
    """Bytes that the transports of all workers have received, or copied within a process."""
    total = 0.0
    for port in range(side.first_metrics_port, side.first_metrics_port + side.num_workers):
        text = client.get(f"http://127.0.0.1:{port}/metrics").text
        total += sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == "triptych_transfer_bytes_total"
            and sample.labels["direction"] in ("received", "local")
        )
    return total


def report(sides: dict[str, Side], num_rounds: int, num_tokens: int) -> str:
    """A line for each side, the ratio last."""
    rows = [
        (
            name,
            f"{statistics.median(side.hand_overs_ms):.2f} ms",
            f"{_highest_decile(side.hand_overs_ms):.2f} ms",
            f"{statistics.median(side.second_tokens_ms):.2f} ms",
            f"{side.moved_bytes / num_rounds:,.0f}",
        )
        for name, side in sides.items()
    ]
    head = (
        f"{num_tokens} tokens, real compute",
        "hand-over",
        "90 %",
        "first to second token",
        "bytes moved per answer",
    )
    one, two = (statistics.median(side.hand_overs_ms) for side in sides.values())
    return f"{table(head, rows)}\nhand-over in two processes over one: {two / one:.1f} (aim: 10)"


def _highest_decile(values: Sequence[float]) -> float:
    return sorted(values)[int(0.9 * (len(values) - 1))]


if __name__ == "__main__":
    main()
