"""`triptych role`: a worker and a role in, what the switch took out; alone, a list of workers.

Talks to a gateway over HTTP and knows nothing of the bus.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table
from rich.text import Text

from shared.errors import SettingsError, TriptychError
from shared.runtime.access import Server, add_server_flags, server_of
from shared.runtime.flags import Parser
from shared.runtime.lifecycle import report
from shared.runtime.settings import exit_with

PROG = "triptych role"
TIMEOUT_S = 660.0
EPILOG = """\
A role is one or more stages: encode, prefill, decode, or their letters, such as PD. The worker
finishes or hands over what it is at, and goes on in the new role in the same process.

examples:
  triptych role                        who hosts what
  triptych role decode-1 prefill       one decoder fewer, one prefill worker more
  triptych role worker-0 PD --force    even if nobody else encodes"""


class RoleError(TriptychError):
    """The roles could not be read, or there was no switch."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What to do, and where. Without a worker: list them."""

    server: Server
    worker: str = ""
    role: str = ""
    force: bool = False


def main(argv: Sequence[str]) -> None:
    try:
        wish = parse(argv)
    except SettingsError as error:
        exit_with(PROG, error)
    try:
        with http_client(wish.server) as client:
            carry_out(wish, client, Console())
    except TriptychError as error:
        raise SystemExit(report(error)) from None


def http_client(server: Server) -> httpx.Client:
    return httpx.Client(
        base_url=server.url, headers=server.headers, timeout=TIMEOUT_S, trust_env=False
    )


def parse(argv: Sequence[str]) -> Wish:
    """The command line as a wish. Raises `SettingsError`."""
    parser = Parser(
        prog=PROG,
        usage=f"{PROG} [WORKER ROLE] [OPTIONS]",
        description="Shows which stages the workers host, or has one host others.",
        epilog=EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar="WORKER ROLE", help="who, and the new role")
    add_server_flags(parser)
    parser.add_argument(
        "--force", action="store_true", help="even if a stage is left without any worker"
    )
    given = parser.parse_all(argv)
    if len(given.words) not in (0, 2):
        raise SettingsError(f"{len(given.words)} names are given: should be WORKER ROLE, or none")
    worker, role = given.words or ("", "")
    return Wish(server_of(given), worker, role, given.force)


def carry_out(wish: Wish, client: httpx.Client, console: Console) -> None:
    """Raises `RoleError`."""
    if not wish.worker:
        console.print(table(ask(client, wish.server.url, "GET", "/v1/roles")["workers"]))
        return
    with console.status(f"{wish.worker}: becoming {wish.role}"):
        done = ask(
            client,
            wish.server.url,
            "POST",
            f"/v1/roles/{wish.worker}",
            json={"role": wish.role, "force": wish.force},
        )
    before, after = ("+".join(done[key]) for key in ("before", "after"))
    if before == after:
        console.print(f"{wish.worker} hosts {after} already", highlight=False)
        return
    console.print(
        f"{wish.worker}: {before} -> {after} in {done['total_s']:.2f} s "
        f"(ending the old role {done['drain_s']:.2f} s, building the new {done['build_s']:.2f} s)",
        highlight=False,
    )


def ask(client: httpx.Client, url: str, method: str, path: str, **options: Any) -> dict[str, Any]:
    """One call. Raises `RoleError` with the gateway's own words."""
    try:
        response = client.request(method, path, **options)
    except httpx.HTTPError as error:
        why = str(error) or type(error).__name__
        raise RoleError(f"no gateway answers at {url} ({why})") from None
    try:
        body = response.json()
        if response.is_success:
            return dict(body)
        message = body["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"the gateway at {url} answered {response.status_code}"
    raise RoleError(message)


def table(workers: Sequence[dict[str, Any]]) -> Table:
    """One row a worker."""
    rows = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("worker", "stages", "state", "model", "host", "pid"):
        rows.add_column(heading)
    for each in workers:
        state = Text("ready", "green") if each["ready"] else Text("busy", "yellow")
        rows.add_row(
            Text(each["worker"], "bold"),
            " ".join(each["stages"]),
            state,
            each["model"],
            each["host"],
            str(each["pid"]),
        )
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
