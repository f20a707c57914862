"""Look, decide, act: the planner's loop over a running system.

In: an observer, a policy, and a way to have a worker switched. Out: switches, or, where it only
advises, numbers for an orchestrator. One switch at a time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from services.planner.online.advice import Advices, advise
from services.planner.online.decision import Policy, State, Switch, decide
from services.planner.online.load import Observation, demands, loads
from services.planner.online.metrics import PlannerMetrics
from services.planner.online.observer import Observer
from shared.clock import Clock, monotonic
from shared.errors import BusError
from shared.runtime.lifecycle import Stop
from shared.runtime.role_rules import SwitchRefused
from shared.runtime.topology import name_of
from shared.telemetry.logs import log_event

logger = logging.getLogger(__name__)

Actuator = Callable[[Switch], Awaitable[object]]
"""Has a worker switched and returns once it takes its new tasks. Raises `SwitchRefused` or
`BusError`."""


class Planner:
    """`act` is None where it only advises."""

    def __init__(
        self,
        observer: Observer,
        policy: Policy,
        metrics: PlannerMetrics,
        *,
        act: Actuator | None,
        max_workers: int,
        clock: Clock = monotonic,
    ) -> None:
        self._observer = observer
        self._policy = policy
        self._metrics = metrics
        self._act = act
        self._max_workers = max_workers
        self._clock = clock
        self._state = State()
        self._advices = Advices()

    async def run(self, stop: Stop, interval_s: float) -> None:
        """Look again and again until a stop is requested; a bus that is away is waited for."""
        while not stop.requested:
            try:
                await self.step()
            except BusError as error:
                logger.warning("cannot look at the system, trying again: %s", error)
            with suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await stop.wait()

    async def step(self) -> Switch | None:
        """One look; the switch that was made or tried, if any. Raises `BusError`."""
        observed = await self._observer.look()
        self._tell(observed)
        self._advices = advise(
            self._policy, self._advices, observed, self._clock(), max_workers=self._max_workers
        )
        for stage, count in self._advices.counts.items():
            self._metrics.desired.labels(stage.value).set(count)
        if self._act is None:
            return None
        self._state, switch = decide(self._policy, self._state, observed, self._clock())
        if switch is not None:
            await self._switch(self._act, switch)
        return switch

    async def _switch(self, act: Actuator, switch: Switch) -> None:
        log_event(
            logger,
            "switching",
            worker=switch.worker,
            before=name_of(switch.before),
            after=name_of(switch.after),
            reason=switch.reason,
        )
        outcome = "refused"
        try:
            await act(switch)
            outcome = "done"
            self._state = self._state.ended(self._clock())
        except (SwitchRefused, BusError) as error:
            logger.warning("worker %s was not switched: %s", switch.worker, error)
            self._state = self._state.refused(switch, self._clock(), self._policy)
        self._metrics.switches.labels(name_of(switch.after), outcome).inc()

    def _tell(self, observed: Observation) -> None:
        load = loads(demands(observed, self._policy.targets), observed.workers)
        for stage, value in load.items():
            self._metrics.load.labels(stage.value).set(value)
            self._metrics.depth.labels(stage.value).set(observed.depths.get(stage, 0))
