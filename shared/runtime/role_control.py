"""Asks a worker to host other stages, and waits until it does.

In: the bus, who is registered, a worker's name and its new stages. Out: what the switch took, or a
`SwitchRefused`. The gateway's route, and through it the command line, and the planner all come
through here. Knows nothing of how a worker switches.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from shared.bus import subjects
from shared.bus.base import Bus, Headers
from shared.clock import Clock, monotonic
from shared.messages.control import Registration, RolePhase, RoleReport, RoleRequest
from shared.runtime.role_rules import RefusalKind, SwitchRefused, check_switch
from shared.runtime.topology import Stages, name_of

ASK_AGAIN_S = 1.0
"""Between two copies of a request: each is answered, which also shows that the worker lives."""
SILENCE_S = 10.0
"""Without any answer for so long, the worker counts as lost."""
MAX_REPORTS = 64
TIMEOUT_S = 600.0
"""For all of a switch: reading a large part of a model from a cold disk takes minutes."""

SEEN_S = 2.0
"""For the new role to be seen: registrations and reports come by different ways."""

OnReport = Callable[[RoleReport], None]

_REFUSALS = {
    RolePhase.REFUSED_BUSY: RefusalKind.IN_PROGRESS,
    RolePhase.REFUSED_PART: RefusalKind.MISSING_PART,
    RolePhase.FAILED: RefusalKind.FAILED,
}


class Registered(Protocol):
    """Who is registered; a `WorkerDirectory`, say."""

    def live(self) -> list[Registration]:
        """Every registered worker."""
        ...

    async def until(self, ready: Callable[[], bool]) -> None:
        """Return when this is so; registrations are what it looks at."""
        ...


@dataclass(frozen=True, slots=True)
class SwitchResult:
    """A switch that took place. `drain_s`: until the old stages had ended; `build_s`: from then
    until the new ones took tasks; `total_s`: as the asker saw it."""

    worker: str
    before: Stages
    after: Stages
    drain_s: float
    build_s: float
    total_s: float


async def request_switch(
    bus: Bus,
    registered: Registered,
    worker: str,
    stages: Stages,
    *,
    force: bool = False,
    on_report: OnReport | None = None,
    timeout_s: float = TIMEOUT_S,
    silence_s: float = SILENCE_S,
    clock: Clock = monotonic,
) -> SwitchResult:
    """Have the worker of that name host these stages; returns once it takes their tasks and
    `registered` says so.

    A worker that hosts them already is left alone. `force` allows a switch that leaves a stage
    without any worker. Raises `SwitchRefused`, or a `BusError` if the bus is away.
    """
    known = check_switch(registered.live(), worker, stages, force=force)
    if known.stages == stages:
        return SwitchResult(worker, stages, stages, 0.0, 0.0, 0.0)
    asked_s = clock()
    request = RoleRequest(switch_id=uuid.uuid4().hex, worker=known.worker, stages=stages)
    end = await _ask(bus, request, on_report, timeout_s, silence_s, clock)
    if kind := _REFUSALS.get(end.phase):
        raise SwitchRefused(kind, f"worker {worker}: {end.detail}")
    with suppress(TimeoutError):  # the switch took place, whoever has not heard of it
        async with asyncio.timeout(SEEN_S):
            await registered.until(
                lambda: any(
                    each.worker == known.worker and each.ready and each.stages == end.stages
                    for each in registered.live()
                )
            )
    return SwitchResult(
        worker, known.stages, end.stages, end.drain_s, end.build_s, clock() - asked_s
    )


async def _ask(
    bus: Bus,
    request: RoleRequest,
    on_report: OnReport | None,
    timeout_s: float,
    silence_s: float,
    clock: Clock,
) -> RoleReport:
    """Send the request until a report ends the switch."""
    reports: asyncio.Queue[RoleReport] = asyncio.Queue(MAX_REPORTS)

    async def on_message(report: RoleReport, headers: Headers) -> None:
        if report.switch_id == request.switch_id:
            with suppress(asyncio.QueueFull):  # the next copy of the request brings it again
                reports.put_nowait(report)

    subscription = await bus.subscribe(subjects.ROLE_REPORTS, RoleReport, on_message)
    try:
        give_up_s, heard_s, asked_s = clock() + timeout_s, clock(), float("-inf")
        while clock() < min(give_up_s, heard_s + silence_s):
            if clock() - asked_s >= ASK_AGAIN_S:
                await bus.publish(subjects.ROLE, request)
                asked_s = clock()
            with suppress(TimeoutError):
                async with asyncio.timeout(min(ASK_AGAIN_S, silence_s)):
                    report = await reports.get()
                heard_s = clock()
                if on_report is not None:
                    on_report(report)
                if report.phase.is_end:
                    return report
    finally:
        await subscription.close()
    silent_s = clock() - heard_s
    raise SwitchRefused(
        RefusalKind.NO_ANSWER,
        f"worker {request.worker.name} did not finish its switch to {name_of(request.stages)}: "
        f"it was last heard {silent_s:.1f} s ago and may have died",
    )
