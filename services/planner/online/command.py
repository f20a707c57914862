"""`triptych planner`: the planner as a service of a running system."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack

from prometheus_client import CollectorRegistry

from services.planner.online.decision import Switch
from services.planner.online.metrics import PlannerMetrics
from services.planner.online.observer import Observer
from services.planner.online.planner import Planner
from services.planner.online.settings import PlannerSettings
from shared.runtime.connection import connect_bus, new_identity
from shared.runtime.lifecycle import Stop, run_service
from shared.runtime.role_control import SwitchResult, request_switch
from shared.runtime.settings import settings_or_exit
from shared.telemetry import logs
from shared.telemetry.http import Health, TelemetryEndpoint

PROG = "triptych planner"

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> None:
    settings = settings_or_exit(PlannerSettings, argv, PROG)
    run_service(lambda stop: serve(settings, stop))


async def serve(settings: PlannerSettings, stop: Stop) -> None:
    """Plan until a stop is requested."""
    me = new_identity(settings.name, "planner")
    telemetry = settings.telemetry
    logs.setup_logging(telemetry.log_level.upper(), telemetry.log_format, me.name)
    registry = CollectorRegistry()
    async with AsyncExitStack() as scope:
        bus = await scope.enter_async_context(await connect_bus(settings.bus, me))
        observer = await scope.enter_async_context(
            Observer(
                bus,
                settings.model.name,
                ttl_s=settings.registration_ttl_s,
                window_s=settings.switches.cooldown_s,
            )
        )
        await scope.enter_async_context(
            TelemetryEndpoint(
                registry,
                lambda: Health(ready=True),
                host=settings.metrics_host,
                port=settings.metrics_port,
            )
        )

        async def act(switch: Switch) -> SwitchResult:
            return await request_switch(bus, observer.directory, switch.worker, switch.after)

        planner = Planner(
            observer,
            settings.policy,
            PlannerMetrics.create(registry),
            act=None if settings.advise else act,
            max_workers=settings.max_workers,
        )
        logs.log_event(logger, "ready", role="planner", model=settings.model.name)
        await planner.run(stop, settings.interval_s)


if __name__ == "__main__":
    main(sys.argv[1:])
