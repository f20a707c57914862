"""How long a change of role takes, by the roles before and after, with real bus and transport.

A cluster of two encoders, two prefill and two decode workers, idle or (`--load`) answering. One
worker goes to and fro between prefill and decode, another between encode and decode. Prints the
median of each kind of switch: ending the old role, building the new one, and all of it as the asker
sees it; last, how much slower the switches are that read weights, and the prefill-decode switch
beside its aim. The model is the demo model unless `--model` names another.
"""

from __future__ import annotations

import argparse
import statistics
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.client import chat_body
from bench.server import running_server

AIM_S = 0.7
TOPOLOGY = "2E 2P 2D"
ROUND_TRIPS = (("decode-1", "prefill", "decode"), ("encoder-1", "decode", "encode"))
PARTS = ("drain_s", "build_s", "total_s")

Switches = dict[tuple[str, str], list[dict[str, float]]]


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m bench role_switch", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="round trips of each kind (7)")
    parser.add_argument("--load", type=int, default=0, help="requests at work at a time (0)")
    parser.add_argument("--model", default="", help="model folder [default: the demo model]")
    options = parser.parse_args()
    arguments = ["--topology", TOPOLOGY, *(["--model", options.model] if options.model else [])]
    with running_server(arguments) as url, under_load(url, options.load):
        switches = measure(url, options.rounds)
    report(switches, options.load)


def measure(url: str, num_rounds: int) -> Switches:
    """All switches by (before, after)."""
    found: Switches = {}
    with httpx.Client(base_url=url, timeout=120.0, trust_env=False) as client:
        for _ in track(range(num_rounds), "switching"):
            for worker, away, home in ROUND_TRIPS:
                for role in (away, home):
                    response = client.post(f"/v1/roles/{worker}", json={"role": role})
                    response.raise_for_status()
                    body = response.json()
                    kind = ("+".join(body["before"]), "+".join(body["after"]))
                    found.setdefault(kind, []).append({part: body[part] for part in PARTS})
    return found


@contextmanager
def under_load(url: str, num_clients: int) -> Iterator[None]:
    """Within: so many clients ask one question after the other; any failure is raised."""
    over = threading.Event()
    failures: list[Exception] = []

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=120.0, trust_env=False) as client:
            model = client.get("/v1/models").json()["data"][0]["id"]
            body = chat_body(model, [], "hello", max_tokens=200, ignore_eos=True)
            while not over.is_set():
                try:
                    client.post("/v1/chat/completions", json=body).raise_for_status()
                except httpx.HTTPError as error:
                    failures.append(error)
                    return

    threads = [threading.Thread(target=ask) for _ in range(num_clients)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


def report(switches: Switches, load: int) -> None:
    """The table, then the ratio."""
    table = Table(title=f"median seconds of {len(next(iter(switches.values())))}, load {load}")
    for heading in ("switch", "ending", "building", "in all"):
        table.add_column(heading)
    medians = {}
    for kind, found in switches.items():
        parts = {part: statistics.median(each[part] for each in found) for part in PARTS}
        medians[kind] = parts["total_s"]
        table.add_row(" -> ".join(kind), *(f"{parts[part]:.3f}" for part in PARTS))
    console = Console()
    console.print(table)
    kept = max(medians["decode", "prefill"], medians["prefill", "decode"])
    read = max(medians["decode", "encode"], medians["encode", "decode"])
    console.print(f"switches that read weights / prefill-decode: {read / kept:.1f}")
    verdict = "within" if kept <= AIM_S else "above"
    console.print(f"prefill-decode: {kept:.3f} s, {verdict} the aim of {AIM_S} s")


if __name__ == "__main__":
    main()
