"""Triptych and other servers side by side, on one model folder and the same prompts.

Starts Triptych (every stage a process of its own, and once more with all stages in one process
where `triptych up` can) and the peers that are installed, then asks all of them in turn, round by
round, over HTTP. Every prompt is new, so that no cache answers. Prints medians, the median of the
per-round ratios to the best peer, and the distance to the hardware's floor. Other load on the
machine falsifies results: each batch waits for a quiet machine, and the share that others took
meanwhile is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from bench.client import Timed, chat_body, stream
from bench.floors import Floors, measure_floors
from bench.peers import PEERS, peers_home
from bench.processes import START_TIMEOUT_S, ForeignLoad, running
from bench.workloads import WORKLOADS, Prompts, Workload, workloads_named
from services.launcher.ports import free_port

TOPOLOGIES = {"triptych": (), "triptych-1": ("--topology", "1EPD")}
"""Our own sides: all stages apart, and all in one process."""


@dataclass(frozen=True)
class Side:
    """One running server."""

    name: str
    url: str
    served_name: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """One batch on one side: medians over its requests, and its whole output rate."""

    side: str
    workload: str
    round: int
    ttft_ms: float
    decode_per_s: float
    total_per_s: float
    foreign: float


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m bench compare", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--peers", default=",".join(PEERS), help="names divided by commas")
    ours = ",".join(TOPOLOGIES)
    parser.add_argument("--own", default=ours, help=f"of {ours}, divided by commas")
    every = ",".join(workload.key for workload in WORKLOADS)
    parser.add_argument("--workloads", default=every, help=f"of {every}, divided by commas")
    parser.add_argument("--rounds", type=int, default=3, help="batches per side and workload (3)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer (64)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="for the peers")
    parser.add_argument("--max-foreign", type=float, default=0.1, help="others' CPU share (0.1)")
    parser.add_argument("--quiet-wait-s", type=float, default=60.0, help="patience for quiet (60)")
    parser.add_argument("--out", type=Path, help="file for every measured batch, as JSON lines")
    parser.add_argument("--up", default="", help="more arguments of `triptych up`")
    options = parser.parse_args()
    unknown = sorted(set(filter(None, options.peers.split(","))) - PEERS.keys())
    if unknown:
        parser.error(f"--peers: {', '.join(unknown)} unknown; known: {', '.join(PEERS)}")
    options.own = options.own.split(",")
    if unknown := sorted(set(options.own) - TOPOLOGIES.keys()):
        parser.error(f"--own: {', '.join(unknown)} unknown; known: {ours}")
    try:
        options.workloads = workloads_named(options.workloads)
    except ValueError as error:
        parser.error(str(error))
    # A stop from outside must end the servers too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    floors = measure_floors(options.model, options.threads)
    print(floors.describe(), flush=True)
    with ExitStack() as scope, tempfile.TemporaryDirectory() as logs:
        sides = list(start_sides(scope, options, Path(logs)))
        measured = compare(sides, options)
    if options.out:
        options.out.write_text("".join(json.dumps(asdict(each)) + "\n" for each in measured))
    print(report(measured, floors, options.tokens))


def start_sides(scope: ExitStack, options: argparse.Namespace, logs: Path) -> Iterator[Side]:
    """Everything that can be started; says of each other one why not."""
    home, model = peers_home(), options.model.resolve()
    for name in options.own:
        extra = TOPOLOGIES[name]
        port = free_port()
        command = (
            *(sys.executable, "-m", "services.cli", "up", "--port", str(port)),
            *("--model", str(model), "--served-name", "bench", *extra, *options.up.split()),
        )
        yield from _start(scope, Side(name, _url(port), "bench", {}), command, {}, logs)
    for name in filter(None, options.peers.split(",")):
        peer, port = PEERS[name], free_port()
        missing = peer.missing(home, model)
        if missing:
            print(f"{name}: absent ({', '.join(missing)})", flush=True)
            continue
        fill = [peer.filled(text, home, model, port, options.threads) for text in peer.command]
        environment = {
            key: peer.filled(value, home, model, port, options.threads)
            for key, value in peer.environment.items()
        }
        served = peer.filled(peer.served_name, home, model, port, options.threads)
        side = Side(name, _url(port), served, dict(peer.body))
        yield from _start(scope, side, fill, environment, logs)


def _start(
    scope: ExitStack, side: Side, command: Sequence[str], environment: dict[str, str], logs: Path
) -> Iterator[Side]:
    log = logs / f"{side.name}.log"
    try:
        scope.enter_context(running(command, environment, side.url, log))
        _until_it_answers(side)
    except (RuntimeError, OSError) as error:
        tail = log.read_text(errors="replace")[-600:] if log.exists() else ""
        print(f"{side.name}: did not start: {error}\n{tail}", flush=True)
        return
    print(f"{side.name}: up", flush=True)
    yield side


def _until_it_answers(side: Side) -> None:
    """A server that listens may still be loading its model."""
    body = {**chat_body(side.served_name, [], "Hello"), "max_tokens": 1}
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            answer = httpx.post(f"{side.url}/v1/chat/completions", json=body, timeout=300.0)
        except httpx.HTTPError as error:
            said = repr(error)
        else:
            if answer.status_code == 200:
                return
            said = f"HTTP {answer.status_code}: {answer.text[:300]}"
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"{side.name}: no answer in {START_TIMEOUT_S:g} s: {said}")
        time.sleep(2.0)


def _url(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def compare(sides: Sequence[Side], options: argparse.Namespace) -> list[Measured]:
    """Round by round, every side with the same requests, the order turning."""
    prompts, load = Prompts(options.model), ForeignLoad()
    measured = []
    for number in range(options.rounds + 1):
        for workload in options.workloads:
            requests = [prompts.make(workload) for _ in range(workload.concurrency)]
            turn = number % max(1, len(sides))
            for side in (*sides[turn:], *sides[:turn]):
                load.wait_until_quiet(options.max_foreign, options.quiet_wait_s)
                load.mark()
                result = ask(side, workload, requests, options.tokens)
                if number and result:  # the first round warms up
                    one = Measured(side.name, workload.name, number, *result, load.share())
                    measured.append(one)
                    print(f"  {one}", flush=True)
    return measured


def ask(
    side: Side, workload: Workload, requests: Sequence[tuple[list[bytes], str]], num_tokens: int
) -> tuple[float, float, float] | None:
    """TTFT in ms and decode rate, medians of the batch, and its total rate; None if one failed."""
    options: dict[str, Any] = {"temperature": 0, "max_tokens": num_tokens, "ignore_eos": True}
    options = {k: v for k, v in {**options, **side.body}.items() if v is not None}

    def one(request: tuple[list[bytes], str]) -> Timed:
        with httpx.Client(timeout=600.0) as client:
            return stream(client, side.url, chat_body(side.served_name, *request, **options))

    started_s = time.perf_counter()
    try:
        with ThreadPoolExecutor(workload.concurrency) as pool:
            answers = list(pool.map(one, requests))
    except (RuntimeError, httpx.HTTPError, KeyError) as error:
        print(f"{side.name}, {workload.name}: failed: {error}", flush=True)
        return None
    took_s = time.perf_counter() - started_s
    counts = [answer.num_tokens or len(answer.gaps_s) + 1 for answer in answers]
    rates = [(n - 1) / max(sum(a.gaps_s), 1e-9) for n, a in zip(counts, answers, strict=True)]
    ttft_ms = 1e3 * statistics.median(answer.ttft_s for answer in answers)
    return ttft_ms, statistics.median(rates), sum(counts) / took_s


def report(measured: Sequence[Measured], floors: Floors, num_tokens: int) -> str:
    """A table per workload. Ratios are to the best peer of the same round; above 1 is ahead."""
    lines = []
    for workload in WORKLOADS:
        of_workload = [each for each in measured if each.workload == workload.name]
        if not of_workload:
            continue
        lines.append(f"\n{workload.name} (floor: {floor_of(floors, workload, num_tokens)})")
        lines.append(
            f"  {'':12}{'TTFT ms':>10}{'ratio':>7}{'decode/s':>10}{'ratio':>7}"
            f"{'total/s':>9}{'ratio':>7}{'foreign':>9}"
        )
        for side in dict.fromkeys(each.side for each in of_workload):
            lines.append(_line(side, of_workload))
    return "\n".join(lines)


def floor_of(floors: Floors, workload: Workload, num_tokens: int) -> str:
    """What the hardware allows, in the table's units."""
    prefill_s = floors.prefill_s(workload.prompt_tokens, workload.picture_size)
    decode_s = floors.decode_s(workload.concurrency)
    text = f"TTFT {1e3 * prefill_s:.0f} ms alone, decode {1 / decode_s:.1f}/s"
    if workload.concurrency > 1:
        whole_s = workload.concurrency * prefill_s + num_tokens * decode_s
        text += f", total {workload.concurrency * num_tokens / whole_s:.1f}/s"
    return text


def _line(side: str, measured: Sequence[Measured]) -> str:
    own = [each for each in measured if each.side == side]
    cells = [f"  {side:12}"]
    for field, width in (("ttft_ms", 10), ("decode_per_s", 10), ("total_per_s", 9)):
        median = statistics.median(getattr(each, field) for each in own)
        ratios = [r for each in own if (r := _ratio(each, field, measured)) is not None]
        cells.append(f"{median:>{width}.1f}")
        cells.append(f"{statistics.median(ratios):>7.2f}" if ratios else f"{'-':>7}")
    cells.append(f"{statistics.median(each.foreign for each in own):>9.2f}")
    return "".join(cells)


def _ratio(own: Measured, field: str, measured: Sequence[Measured]) -> float | None:
    """How far ahead of the best other peer in the same round, as a factor."""
    others = [
        getattr(each, field)
        for each in measured
        if each.round == own.round and each.side not in TOPOLOGIES and each.side != own.side
    ]
    value = getattr(own, field)
    if not others or not value:
        return None
    return float(min(others) / value if field == "ttft_ms" else value / max(others))


if __name__ == "__main__":
    main()
