"""Who computes with which threads in a worker: one team, the compute thread's."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from services.encoder import build as encoder_build
from shared.runtime import language
from shared.runtime.host import ModelFolder
from tests.support.demo_engine import folder
from tests.support.stages import running_pipeline

__all__ = ["folder"]

ONE_TEAM = """
import asyncio, os, threading
import torch
from shared.runtime.compute import ComputeThread
from shared.runtime.host import give_team


def product():
    torch.ones(600, 600) @ torch.ones(600, 600)
    return torch.get_num_threads()


def others():
    return set(map(int, os.listdir("/proc/self/task"))) - {
        thread.native_id for thread in threading.enumerate()
    }


async def main():
    with ComputeThread() as compute:
        await give_team(compute, int(os.environ["GIVEN"]))
        before = others()
        numbers = [await compute(product), product(), await asyncio.to_thread(product)]
        print(*numbers, len(others() - before))


asyncio.run(main())
"""


@pytest.mark.parametrize("given", ["0", "2"])
@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_no_thread_but_the_compute_thread_has_a_team(given: str) -> None:
    """In a process of its own: who has computed before keeps its team."""
    threads = {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", ONE_TEAM],
        env={**os.environ, **threads, "GIVEN": given},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["2", "1", "1", "1"], done.stderr


async def test_weights_are_loaded_on_the_compute_thread(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that only loads would keep a team for as long as it lives."""
    threads: list[str] = []
    for module, name in ((language, "load_language"), (encoder_build, "load_executor")):
        load = getattr(module, name)

        def loaded(*args: object, load: object = load) -> object:
            threads.append(threading.current_thread().name)
            assert callable(load)
            return load(*args)

        monkeypatch.setattr(module, name, loaded)
    async with running_pipeline(folder, topology="E-PD"):
        assert threads == ["compute", "compute"]
