"""The supervisor, over small real processes."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from services.launcher.log_line import LogLine
from services.launcher.plan import ProcessSpec, StopRank
from services.launcher.restart import RestartPolicy
from services.launcher.supervisor import BadSetting, GaveUp, Supervisor, how_it_ended
from shared.errors import TriptychError

QUICK = RestartPolicy(first_delay_s=0.01, max_delay_s=0.02)

OBEDIENT = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print('{"level": "info", "event": "ready"}', flush=True)
while True: time.sleep(60)
"""
DEAF = OBEDIENT.replace("lambda *_: sys.exit(0)", "signal.SIG_IGN")
PARENT = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {DEAF!r}])\n{OBEDIENT}"


class Notes:
    """A watcher that remembers, and lets a test wait for a note."""

    def __init__(self) -> None:
        self.all: list[tuple[str, ...]] = []
        self._news = asyncio.Event()

    def _note(self, *words: str) -> None:
        self.all.append(words)
        self._news.set()

    def started(self, name: str, pid: int) -> None:
        self._note("started", name)

    def said(self, name: str, line: LogLine) -> None:
        self._note("said", name, line.event)

    def ended(self, name: str, how: str, restart_in_s: float) -> None:
        self._note("ended", name, how)

    def stopping(self, name: str) -> None:
        self._note("stopping", name)

    def stopped(self, name: str) -> None:
        self._note("stopped", name)

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not holds():
                self._news.clear()
                await self._news.wait()


@contextlib.asynccontextmanager
async def supervised(grace_s: float = 10.0) -> AsyncIterator[tuple[Supervisor, Notes]]:
    notes = Notes()
    supervisor = Supervisor(notes, QUICK)
    try:
        yield supervisor, notes
    finally:
        await supervisor.stop(grace_s)


def spec(name: str, code: str, rank: StopRank = StopRank.WORKER) -> ProcessSpec:
    return ProcessSpec(name, (sys.executable, "-c", code), rank)


def alive(pid: int) -> bool:
    """A zombie counts as dead."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


async def test_a_killed_process_is_reported_and_started_again() -> None:
    async with supervised() as (supervisor, notes):
        await supervisor.start(spec("a", OBEDIENT))
        await notes.until(lambda: ("said", "a", "ready") in notes.all)
        first = supervisor.pid("a")
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await notes.until(lambda: notes.all.count(("said", "a", "ready")) == 2)
        assert ("ended", "a", "was killed by SIGKILL") in notes.all
        assert supervisor.pid("a") not in (None, first)


async def test_a_process_that_cannot_start_is_given_up_with_its_last_words() -> None:
    code = 'print(\'{"level": "error", "event": "no weights"}\'); print("bye"); raise SystemExit(3)'
    async with supervised() as (supervisor, notes):
        await supervisor.start(spec("a", code))
        with pytest.raises(GaveUp, match="a exited with code 3 and 3 starts .*: no weights"):
            await asyncio.wait_for(supervisor.failed(), 20)
        assert notes.all.count(("started", "a")) == 3
        assert notes.all.count(("ended", "a", "exited with code 3: no weights")) == 2


async def test_a_process_that_refuses_a_setting_is_given_up_as_a_bad_setting() -> None:
    async with supervised() as (supervisor, notes):
        await supervisor.start(spec("a", 'print("--x = 3: too small"); raise SystemExit(2)'))
        with pytest.raises(BadSetting, match="its settings are wrong: --x = 3: too small"):
            await asyncio.wait_for(supervisor.failed(), 20)
        assert notes.all.count(("started", "a")) == 1


async def test_after_all_were_ready_nothing_is_given_up() -> None:
    async with supervised() as (supervisor, notes):
        await supervisor.start(spec("a", OBEDIENT))
        supervisor.all_ready()
        for life in range(1, 6):
            await notes.until(lambda life=life: notes.all.count(("said", "a", "ready")) == life)
            pid = supervisor.pid("a")
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        await notes.until(lambda: notes.all.count(("ended", "a", "was killed by SIGKILL")) == 5)


async def test_they_stop_in_the_order_of_their_ranks() -> None:
    async with supervised() as (supervisor, notes):
        for name, rank in (
            ("bus", StopRank.BUS),
            ("worker", StopRank.WORKER),
            ("gateway", StopRank.GATEWAY),
        ):
            await supervisor.start(spec(name, OBEDIENT, rank))
            await notes.until(lambda name=name: ("said", name, "ready") in notes.all)
        await supervisor.stop(grace_s=10)
        assert [words[1] for words in notes.all if words[0] == "stopped"] == [
            "gateway",
            "worker",
            "bus",
        ]


async def test_a_deaf_process_and_its_children_are_killed() -> None:
    async with supervised(grace_s=0.2) as (supervisor, notes):
        await supervisor.start(spec("a", DEAF))
        await supervisor.start(spec("b", PARENT))
        await notes.until(lambda: [n[0] for n in notes.all].count("said") == 3)
        pids = [supervisor.pid("a"), supervisor.pid("b")]
        grandchildren = [
            int(pid) for pid in Path(f"/proc/{pids[1]}/task/{pids[1]}/children").read_text().split()
        ]
        assert len(grandchildren) == 1
    for pid in (*pids, *grandchildren):
        assert pid is not None
        assert not alive(pid)


async def test_a_program_that_does_not_exist_is_a_clear_error() -> None:
    async with supervised() as (supervisor, _):
        with pytest.raises(TriptychError, match="x cannot be started: .*No such file"):
            await supervisor.start(ProcessSpec("x", ("/no/such/program",), StopRank.WORKER))


async def test_an_endless_line_does_not_stop_the_reading() -> None:
    code = "print('x' * (3 << 20), flush=True)\n" + OBEDIENT
    async with supervised() as (supervisor, notes):
        await supervisor.start(spec("a", code))
        await notes.until(lambda: ("said", "a", "ready") in notes.all)


@pytest.mark.parametrize(
    ("exit_code", "words"),
    [(0, "exited with code 0"), (3, "exited with code 3"), (-15, "was killed by SIGTERM")],
)
def test_how_it_ended(exit_code: int, words: str) -> None:
    assert how_it_ended(exit_code) == words


async def test_a_worker_is_started_again_in_its_last_role(tmp_path: Path) -> None:
    """The second start is another program, which the role names."""
    module = tmp_path / "services"
    module.mkdir()
    (module / "__init__.py").touch()
    changed = '{"level": "info", "event": "role_changed", "stages": "decode"}'
    (module / "prefill.py").write_text(f"print({changed!r}, flush=True)\n{OBEDIENT}")
    (module / "decode.py").write_text(OBEDIENT.replace("ready", "decoding"))
    async with supervised() as (supervisor, notes):
        command = (sys.executable, "-m", "services.prefill")
        path = {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
        await supervisor.start(ProcessSpec("a", command, StopRank.WORKER, path))
        await notes.until(lambda: ("said", "a", "ready") in notes.all)
        pid = supervisor.pid("a")
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await notes.until(lambda: ("said", "a", "decoding") in notes.all)
