"""`triptych ask`: pictures, clips, sounds and a question in, the answer and a waterfall out."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from services.ask.client import Client, chat_body
from services.ask.medium import is_file_name, part
from services.ask.waterfall import print_waterfall
from shared.errors import SettingsError
from shared.runtime.access import LOCAL, Server, add_server_flags, server_of
from shared.runtime.flags import Parser
from shared.runtime.lifecycle import Stop, run_service
from shared.runtime.settings import exit_with

PROG = "triptych ask"
EXIT_INTERRUPTED = 130
EXAMPLES = """\
examples:
  triptych ask plate.png "What number is on the plate?"
  triptych ask before.jpg after.jpg "What has changed?" --max-tokens 200
  triptych ask meeting.mp3 "What is said?"
  triptych ask "Say hello." --url http://10.0.0.5:8000"""


@dataclass(frozen=True, slots=True)
class Question:
    """What to ask, and where. An empty `model` means the one that is served."""

    files: tuple[Path, ...]
    text: str
    server: Server = LOCAL
    model: str = ""
    max_tokens: int | None = None
    shows_trace: bool = True


def main(argv: Sequence[str]) -> None:
    try:
        question = parse(argv)
    except SettingsError as error:
        exit_with(PROG, error)
    run_service(lambda stop: ask_until(stop, question))


def parse(argv: Sequence[str]) -> Question:
    """The command line as a question. Raises `SettingsError`."""
    parser = Parser(
        prog=PROG,
        usage=f"{PROG} [FILE ...] QUESTION [OPTIONS]",
        description="Asks a running server about files and draws where the time went.",
        epilog=EXAMPLES,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words",
        nargs="+",
        metavar="FILE ... QUESTION",
        help="files of what the model is to see or hear, then the question in quotes",
    )
    add_server_flags(parser)
    parser.add_argument("--model", default="", help="model name [default: the one it serves]")
    parser.add_argument(
        "--max-tokens", type=int, metavar="TOKENS", help="longest answer [default: the server's]"
    )
    parser.add_argument(
        "--trace",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="draw where the time went",
    )
    return question_from(parser.parse_all(argv))


def question_from(arguments: argparse.Namespace) -> Question:
    *files, text = arguments.words
    if not text.strip():
        raise SettingsError("the question is empty")
    if Path(text).is_file() or is_file_name(text):
        raise SettingsError(f"the question is missing: it goes last, where {text!r} is")
    if arguments.max_tokens is not None and arguments.max_tokens < 1:
        raise SettingsError(f"--max-tokens = {arguments.max_tokens}: should be at least 1")
    return Question(
        files=tuple(map(Path, files)),
        text=text,
        server=server_of(arguments),
        model=arguments.model,
        max_tokens=arguments.max_tokens,
        shows_trace=arguments.trace,
    )


async def ask_until(stop: Stop, question: Question) -> None:
    """Ask; a signal ends the question, which cancels it on the server too."""
    asking = asyncio.create_task(ask(question, Console()))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((asking, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not asking.done():
            raise SystemExit(EXIT_INTERRUPTED)
        asking.result()
    finally:
        asking.cancel()
        stopping.cancel()
        await asyncio.gather(asking, stopping, return_exceptions=True)


async def ask(question: Question, console: Console, client: Client | None = None) -> None:
    """Stream the answer to the console, then draw its trace. Raises `AskError`."""
    parts = [part(path) for path in question.files]
    async with client or Client(question.server) as server:
        model = question.model or await server.first_model()
        await stream_answer(
            server, chat_body(model, parts, question.text, question.max_tokens), console
        )
        if question.shows_trace and server.trace_id:
            print_waterfall(await server.spans(), console)


async def stream_answer(server: Client, body: dict[str, object], console: Console) -> None:
    """Print each piece as it comes, then one line with the counts."""
    started_s = time.monotonic()
    first_s: float | None = None
    num_tokens, reason = None, None
    try:
        async for piece in server.ask(body):
            if piece.text:
                first_s = first_s or time.monotonic() - started_s
                # Not console.print: the answer is data, its brackets are no markup.
                console.file.write(printable(piece.text))
                console.file.flush()
            reason = piece.finish_reason or reason
            num_tokens = piece.num_completion_tokens or num_tokens
    finally:
        if first_s is not None:
            console.file.write("\n")
    line = summary(first_s, time.monotonic() - started_s, num_tokens, reason)
    console.print(line, style="dim", soft_wrap=True, highlight=False)


def summary(
    first_s: float | None, total_s: float, num_tokens: int | None, reason: str | None
) -> str:
    """For example "4 tokens, first after 52 ms, all after 97 ms, ended by stop"."""
    parts = [f"{num_tokens} tokens"] if num_tokens is not None else []
    if first_s is not None:
        parts.append(f"first after {first_s * 1000:.0f} ms")
    parts += [f"all after {total_s * 1000:.0f} ms", f"ended by {reason}"]
    return ", ".join(parts)


def printable(text: str) -> str:
    """The text without what would drive a terminal (colours, cursor, title)."""
    return "".join(c for c in text if c in "\n\t" or not unicodedata.category(c).startswith("C"))


if __name__ == "__main__":
    main(sys.argv[1:])
