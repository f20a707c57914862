"""Which processes to start, with which arguments and environment. Pure: settings in, specs out."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from services.launcher.settings import LauncherSettings

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class StopRank(IntEnum):
    """The order of the end: no new requests, then no more work, then no bus."""

    GATEWAY = 0
    WORKER = 1
    BUS = 2


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process to keep running. `environment` is added to the launcher's own."""

    name: str
    command: tuple[str, ...]
    stop_rank: StopRank
    environment: Mapping[str, str] = field(default_factory=dict)


def threads_per_worker(num_cores: int, num_workers: int) -> int:
    """A fair share of the cores; oversubscribed thread pools cost far more than they bring."""
    return max(1, num_cores // max(1, num_workers))


def service_specs(
    settings: LauncherSettings, nats_url: str, port: int, num_cores: int
) -> Iterator[ProcessSpec]:
    """The workers, then the gateway."""
    threads = settings.threads or threads_per_worker(num_cores, settings.num_workers)
    environment = dict.fromkeys(THREAD_VARIABLES, str(threads))
    counts = {
        "encoder": settings.encoders,
        "prefill": settings.prefills,
        "decode": settings.decodes,
    }
    for service, count in counts.items():
        for index in range(count):
            name = f"{service}-{index}"
            command = (*_command(service, name, nats_url, settings), *_worker_flags(settings))
            yield ProcessSpec(name, command, StopRank.WORKER, environment)
    yield ProcessSpec(
        "gateway-0",
        (
            *_command("gateway", "gateway-0", nats_url, settings),
            *("--host", settings.host, "--port", str(port)),
        ),
        StopRank.GATEWAY,
    )


def _command(service: str, name: str, nats_url: str, settings: LauncherSettings) -> tuple[str, ...]:
    return (
        *(sys.executable, "-m", f"services.{service}"),
        *("--name", name),
        *("--nats-url", nats_url),
        *("--model", settings.model.path),
        # Named even where it is the default, so that every process agrees on it.
        *("--served-name", settings.model.name),
        *("--log-format", "json"),
    )


def _worker_flags(settings: LauncherSettings) -> tuple[str, ...]:
    dtype = settings.model.dtype
    return (*("--drain-s", str(settings.drain_s)), *(() if dtype == "auto" else ("--dtype", dtype)))
