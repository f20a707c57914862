"""Background work that a process cannot do without."""

from __future__ import annotations

import asyncio
import logging

import pytest

from shared.runtime import keep_running as module
from shared.runtime.keep_running import keep_running


async def test_failed_work_is_started_again_and_the_failure_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "RESTART_PAUSE_S", 0.0)
    runs = 0

    async def work() -> None:
        nonlocal runs
        runs += 1
        if runs < 3:
            raise RuntimeError("lost its way")

    with caplog.at_level(logging.ERROR):
        await keep_running(work, "the heartbeat")
    assert runs == 3
    assert caplog.text.count("the heartbeat failed") == 2


async def test_a_cancelled_loop_ends() -> None:
    task = asyncio.create_task(keep_running(lambda: asyncio.sleep(10), "sleep"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
