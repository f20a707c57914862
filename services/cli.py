"""The `triptych` command: picks a subcommand and hands it the rest of the line.

Each subcommand lives in its own module and is imported only when asked for, so `triptych --help`
answers at once and a machine without torch can still run the gateway.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import version

EXIT_BAD_USAGE = 2

COMMANDS = {
    "up": ("services.launcher.up", "Start everything on this machine and serve"),
    "demo": ("services.launcher.demo", "Start everything, ask one question, stop"),
    "ask": ("services.ask.command", "Ask a running server about pictures"),
    "role": ("services.role.command", "Show which stages workers host, or change one's"),
    "plan": ("services.planner.command", "Find how many workers of which kind a load needs"),
    "profile": (
        "services.planner.profiling.command",
        "Measure how long a model's steps take on this machine",
    ),
    "planner": (
        "services.planner.online.command",
        "Watch a running system and switch workers between stages",
    ),
    "gateway": ("services.gateway.__main__", "Run the HTTP gateway"),
    "encoder": ("services.encoder.__main__", "Run an encode worker"),
    "prefill": ("services.prefill.__main__", "Run a prefill worker"),
    "decode": ("services.decode.__main__", "Run a decode worker"),
    "worker": ("services.worker.__main__", "Run a worker of several stages"),
}
"""Name -> (module with `main(argv) -> None`, what it does)."""

WORKERS = ("profile", "encoder", "prefill", "decode", "worker")

EXAMPLES = """\
examples:
  triptych demo                                    see it work, in seconds
  triptych up --model Qwen/Qwen2.5-VL-3B-Instruct  serve a model on this machine
  triptych up --decodes 2 --port 9000              two decode workers, another port
  triptych up --topology "1EP 2D"                  which stages share a process
  triptych ask plate.png "What number is on it?"   ask, and see where the time went
  triptych decode --nats-url nats://10.0.0.5:4222  one worker of a larger cluster

`triptych COMMAND --help` tells every setting, its limits and its default."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the subcommand named first; returns when it ended well, else raises `SystemExit`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments.pop(0) if arguments else "--help"
    if command in ("-h", "--help", "help"):
        print(usage())
    elif command in ("version", "-V", "--version"):
        print(f"triptych {version('triptych')}")
    elif command in COMMANDS:
        run(command, arguments)
    else:
        raise SystemExit(unknown(command))


def run(command: str, arguments: list[str]) -> None:
    """Import the subcommand's module and call its `main`."""
    module_name, _ = COMMANDS[command]
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("services", "shared"):
            raise
        print(f"triptych {command}: {missing_package(command, error.name)}", file=sys.stderr)
        raise SystemExit(1) from None
    module.main(arguments)


def missing_package(command: str, package: str) -> str:
    """Which extra to install for a package that is not there."""
    extra = "worker,ucx-cu12" if command in WORKERS else "gateway"
    if command in ("plan", "planner"):
        extra = "planner"
    return f"the package {package} is missing: pip install 'triptych[{extra}]'"


def usage() -> str:
    lines = ["usage: triptych COMMAND [OPTIONS]", "", "commands:"]
    lines += [f"  {name:<9}{meaning}" for name, (_, meaning) in COMMANDS.items()]
    lines += ["  version  Print the version", "", EXAMPLES]
    return "\n".join(lines)


def unknown(command: str) -> int:
    """Say that there is no such command; returns the exit code."""
    near = difflib.get_close_matches(command, [*COMMANDS, "version"], n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    print(f"triptych: no command {command!r}{hint}; see triptych --help", file=sys.stderr)
    return EXIT_BAD_USAGE


if __name__ == "__main__":
    main()
