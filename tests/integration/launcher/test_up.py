"""`triptych up` over a real nats-server, with stand-ins for the gateway and the workers."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from services.launcher.cores import own_cores
from services.launcher.data_dir import PREFIX

STAND_IN = """
import argparse, asyncio, json, os, sys
from shared.runtime.lifecycle import run_service

async def answer(reader, writer):
    await reader.readline()
    status = b"503 Not" if "BROKEN" in os.environ else b"200 OK"
    head = b"HTTP/1.1 " + status + b"\\r\\ncontent-length: 2\\r\\n"
    writer.write(head + b"connection: close\\r\\n\\r\\nok")
    await writer.drain()
    writer.close()

async def main(stop):
    if sys.argv[0].endswith(os.environ.get("BROKEN", "nothing") + "/__main__.py"):
        print(json.dumps({"level": "error", "event": "no such weights"}), flush=True)
        raise SystemExit(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    known, _ = parser.parse_known_args()
    for done in (0, 50, 100):
        print(json.dumps({"level": "info", "event": "weights_loading",
                          "bytes_done": done, "bytes_total": 100}), flush=True)
    if known.port:
        await asyncio.start_server(answer, "127.0.0.1", known.port)
    print(json.dumps({"level": "info", "event": "ready"}), flush=True)
    await stop.wait()

run_service(main)
"""
SERVICES = ("gateway", "encoder", "prefill", "decode")


class Up:
    """A running `triptych up` and what it printed so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout:
            self.lines.extend(self.process.stdout)

    def line_with(self, words: str, timeout_s: float = 30) -> str:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for line in list(self.lines):
                if words in line:
                    return line.strip()
            time.sleep(0.02)
        raise AssertionError(f"{words!r} was not printed: {''.join(self.lines)}")

    def pid_of(self, name: str) -> int:
        lines = [line for line in self.lines if line.startswith(f"{name}: started")]
        return int(lines[-1].partition("pid ")[2].rstrip(")\n"))

    def finish(self) -> int:
        code = self.process.wait(timeout=30)
        self._reader.join(timeout=10)
        return code


@pytest.fixture
def stand_ins(tmp_path: Path, repository: Path) -> Path:
    """A folder whose `services` has our launcher, and stand-ins for everything else."""
    services = tmp_path / "stand-ins" / "services"
    services.mkdir(parents=True)
    (services / "__init__.py").touch()
    (services / "launcher").symlink_to(repository / "services" / "launcher")
    (services.parent / "shared").symlink_to(repository / "shared")
    for name in SERVICES:
        (services / name).mkdir()
        (services / name / "__main__.py").write_text(STAND_IN)
    return services.parent


@contextlib.contextmanager
def up(stand_ins: Path, *arguments: str, **environment: str) -> Iterator[Up]:
    temporary = stand_ins / "tmp"
    temporary.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "services.launcher", "--port", "0", *arguments],
        cwd=stand_ins,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary), **environment},
    )
    running = Up(process)
    try:
        yield running
    finally:
        process.terminate()
        running.finish()


def descendants_alive(stand_ins: Path) -> list[str]:
    """Command lines of processes that work in the stand-ins' folder."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and (folder / "cwd").readlink() == stand_ins:
                found.append((folder / "cmdline").read_text().replace("\0", " "))
    return found


def leftovers(stand_ins: Path) -> list[Path]:
    return list((stand_ins / "tmp").glob(f"{PREFIX}*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_a_signal_and_leaves_nothing(
    stand_ins: Path, number: signal.Signals
) -> None:
    with up(stand_ins, "--decodes", "2") as running:
        url = running.line_with("ready http").removeprefix("ready ")
        assert httpx.get(f"{url}/ready", trust_env=False).status_code == 200
        assert len(descendants_alive(stand_ins)) == 1 + 1 + 5
        assert len(leftovers(stand_ins)) == 1
        running.process.send_signal(number)
        assert running.finish() == 0
        stops = [line.partition(":")[0] for line in running.lines if line.endswith("stopped\n")]
    assert stops[0] == "gateway-0"
    assert sorted(stops[1:5]) == ["decode-0", "decode-1", "encoder-0", "prefill-0"]
    assert stops[5] == "nats"
    assert descendants_alive(stand_ins) == []
    assert leftovers(stand_ins) == []


@pytest.mark.skipif(len(own_cores()) < 2, reason="one core cannot be divided")
def test_workers_stay_on_cores_of_their_own(stand_ins: Path) -> None:
    with up(stand_ins, "--encoders", "0", "--threads", "1") as running:
        running.line_with("ready http")
        names = ("prefill-0", "decode-0", "gateway-0")
        prefill, decode, gateway = (os.sched_getaffinity(running.pid_of(name)) for name in names)
    assert not prefill & decode
    assert prefill | decode <= gateway == set(own_cores())


@pytest.mark.parametrize("name", ["decode-0", "nats"])
def test_a_process_that_dies_is_reported_and_comes_back(stand_ins: Path, name: str) -> None:
    with up(stand_ins) as running:
        running.line_with("ready http")
        first = running.pid_of(name)
        os.kill(first, signal.SIGKILL)
        running.line_with(f"{name}: was killed by SIGKILL; starting it again")
        deadline = time.monotonic() + 20
        while running.pid_of(name) == first:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_worker_that_cannot_start_ends_everything_and_says_why(stand_ins: Path) -> None:
    with up(stand_ins, BROKEN="prefill") as running:
        assert running.finish() == 1
    assert running.lines[-1] == (
        "error: prefill-0 exited with code 1 and 3 starts in a row have failed: no such weights\n"
    )
    assert descendants_alive(stand_ins) == []
    assert leftovers(stand_ins) == []


def test_children_do_not_outlive_a_launcher_that_was_killed(stand_ins: Path) -> None:
    with up(stand_ins) as running:
        running.line_with("ready http")
        running.process.kill()
        running.finish()
        deadline = time.monotonic() + 20
        while descendants_alive(stand_ins):
            assert time.monotonic() < deadline, descendants_alive(stand_ins)
            time.sleep(0.05)
    assert len(leftovers(stand_ins)) == 1
    with up(stand_ins) as running:
        running.line_with("ready http")
        assert len(leftovers(stand_ins)) == 1, "the next launcher sweeps the folder"


def test_a_port_that_is_taken_is_said_before_anything_starts(stand_ins: Path) -> None:
    with up(stand_ins) as first:
        port = first.line_with("ready http").rpartition(":")[2]
        with up(stand_ins, "--port", port) as second:
            assert second.finish() == 2
        assert second.lines[0].startswith(f"error: --port = {port}: cannot listen on 127.0.0.1")
        assert len(second.lines) == 1


def test_a_data_dir_is_kept(stand_ins: Path, tmp_path: Path) -> None:
    with up(stand_ins, "--data-dir", str(tmp_path / "data")) as running:
        running.line_with("ready http")
    assert (tmp_path / "data" / "jetstream").is_dir()
