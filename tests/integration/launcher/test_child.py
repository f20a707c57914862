"""Real child processes, and the cores that they are kept on."""

from __future__ import annotations

import os
import sys

import pytest

from services.launcher.child import Child
from services.launcher.cores import own_cores
from services.launcher.log_line import LogLine
from services.launcher.plan import ProcessSpec, StopRank

SAY_CORES = "import os, time; time.sleep(0.5); print(sorted(os.sched_getaffinity(0)), flush=True)"
NO_SUCH_CORE = 1 << 14


@pytest.mark.parametrize(
    ("cores", "expected"),
    [((own_cores()[-1],), [own_cores()[-1]]), ((NO_SUCH_CORE,), sorted(own_cores()))],
    ids=["there", "gone"],
)
async def test_a_child_stays_on_its_cores_while_there_are_any(
    cores: tuple[int, ...], expected: list[int]
) -> None:
    lines: list[LogLine] = []
    spec = ProcessSpec(
        "child", (sys.executable, "-c", SAY_CORES), StopRank.WORKER, dict(os.environ), cores=cores
    )
    child = await Child.start(spec, lines.append)
    try:
        assert await child.wait() == 0
    finally:
        await child.stop(1.0)
    assert [line.event for line in lines] == [str(expected)]
