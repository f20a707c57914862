"""A child that is killed outright leaves no shared memory behind."""

import asyncio
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from services.launcher.child import Child
from services.launcher.log_line import LogLine
from services.launcher.plan import ProcessSpec, StopRank

pytest.importorskip("ucxx")

UCX_PROCESS = """
import asyncio, pathlib, time, ucxx
async def main():
    await ucxx.create_endpoint_from_worker_address(ucxx.get_worker_address())
    maps = pathlib.Path("/proc/self/maps").read_text()
    print("posix" if "ucx_shm_posix" in maps else "none", flush=True)
    time.sleep(60)
asyncio.run(main())
"""


def segments() -> Counter[str]:
    """UCX's files in /dev/shm, and the System V segments that nobody is attached to."""
    files = [path.name for path in Path("/dev/shm").glob("ucx*")]
    listed = subprocess.run(["ipcs", "-m"], capture_output=True, text=True, check=True).stdout
    orphans = [line for line in listed.splitlines() if line.split()[5:6] == ["0"]]
    return Counter(files + orphans)


async def test_a_killed_child_leaves_no_segment() -> None:
    before = segments()
    lines: asyncio.Queue[LogLine] = asyncio.Queue()
    spec = ProcessSpec("ucx", (sys.executable, "-c", UCX_PROCESS), StopRank.WORKER)
    child = await Child.start(spec, lines.put_nowait)
    try:
        async with asyncio.timeout(30):
            while (await lines.get()).event not in ("posix", "none"):
                pass
    finally:
        await child.stop(grace_s=0)
    assert segments() - before == Counter()
