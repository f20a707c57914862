"""Which processes to start, with which arguments and environment. Pure: settings in, specs out."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

from services.launcher.cores import ANYWHERE, divide
from services.launcher.settings import LauncherSettings
from shared.messages.control import Role

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

SERVICES = {Role.ENCODE: "encoder", Role.PREFILL: "prefill", Role.DECODE: "decode"}
"""What runs a worker of one stage; one of several runs as `worker`."""


class StopRank(IntEnum):
    """The order of the end: no new requests, then no more work, then no bus."""

    GATEWAY = 0
    WORKER = 1
    BUS = 2


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process to keep running. `environment` is added to the launcher's own.

    `stages` says for a reader what a worker hosts; `cores` are those that it stays on, if any.
    """

    name: str
    command: tuple[str, ...]
    stop_rank: StopRank
    environment: Mapping[str, str] = field(default_factory=dict)
    stages: str = ""
    cores: tuple[int, ...] = ANYWHERE


def in_role(spec: ProcessSpec, stages: tuple[str, ...]) -> ProcessSpec:
    """The same worker, started to host these stages. A spec of anything else stays as it is."""
    if spec.stop_rank is not StopRank.WORKER or not stages:
        return spec
    service = SERVICES[Role(stages[0])] if len(stages) == 1 else "worker"
    command = list(spec.command)
    command[2] = f"services.{service}"
    if "--stages" in command:
        at = command.index("--stages")
        del command[at : at + 2]
    if len(stages) > 1:
        command += ["--stages", ",".join(stages)]
    return replace(spec, command=tuple(command), stages=" ".join(stages))


MIN_THREADS = 2
"""The stages of a request run one after the other: a single thread each would leave cores idle."""

SPIN_COUNT = 10_000
"""Turns (some tenths of a millisecond) that a thread waits for more work before it sleeps: longer
than the pauses within a step, shorter than what another worker on the same cores would notice."""


CORE_LOCK_VARIABLE = "TRIPTYCH_CORE_LOCK"
"""A variable and no flag: a worker keeps it in whatever role it takes on."""


def threads_per_worker(num_cores: int, num_workers: int) -> int:
    """A fair share of the cores, but two where there are two."""
    return max(min(MIN_THREADS, num_cores), num_cores // max(1, num_workers))


def thread_environment(
    threads: int, num_cores: int, num_workers: int, core_lock: str
) -> dict[str, str]:
    """Sizes of the thread pools; where workers share cores, their idle threads soon sleep, and they
    know of each other."""
    environment = dict.fromkeys(THREAD_VARIABLES, str(threads))
    if threads * num_workers > num_cores:
        environment["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
        environment[CORE_LOCK_VARIABLE] = core_lock
    return environment


def service_specs(
    settings: LauncherSettings, nats_url: str, port: int, cores: Sequence[int], core_lock: str = ""
) -> Iterator[ProcessSpec]:
    """The workers, then the gateway. `cores` are the machine's, neighbours side by side, and
    `core_lock` is a file for these workers on them that no others have."""
    threads = settings.threads or threads_per_worker(len(cores), settings.num_workers)
    environment = thread_environment(threads, len(cores), settings.num_workers, core_lock)
    pinned = settings.pin == "auto"
    parts = divide(cores if pinned else (), threads, settings.num_workers)
    numbers: Counter[str] = Counter()
    for index, stages in enumerate(settings.workers):
        service = SERVICES[stages[0]] if len(stages) == 1 else "worker"
        name = f"{service}-{numbers[service]}"
        numbers[service] += 1
        command = (
            *_command(service, name, nats_url, settings),
            *(("--stages", ",".join(stages)) if len(stages) > 1 else ()),
            *_worker_flags(settings, index),
        )
        hosted = " ".join(stages)
        yield ProcessSpec(name, command, StopRank.WORKER, environment, hosted, parts[index])
    yield ProcessSpec(
        "gateway-0",
        (
            *_command("gateway", "gateway-0", nats_url, settings),
            *("--host", settings.host, "--port", str(port)),
            *_given("--api-key-file", settings.access.api_key_file),
            *_given("--operator-key-file", settings.access.operator_key_file),
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
        # At least info, whatever the terminal shows: the table is made from what they say.
        *("--log-level", "debug" if settings.telemetry.log_level == "debug" else "info"),
        *("--drain-s", str(settings.drain_s)),
        *("--nats-connect-timeout-s", str(settings.bus.connect_timeout_s)),
        *("--nats-ack-wait-s", str(settings.bus.ack_wait_s)),
        *_given("--nats-credentials", settings.bus.credentials_file),
        *_given("--otlp-endpoint", settings.telemetry.otlp_endpoint),
    )


def _given(flag: str, value: object) -> tuple[str, ...]:
    """The flag with its value, or nothing where there is none."""
    return (flag, str(value)) if value else ()


def _worker_flags(settings: LauncherSettings, index: int) -> tuple[str, ...]:
    """Flags of the `index`-th worker of all."""
    dtype = settings.model.dtype
    # Always given: a port from the environment would be every worker's, and only one can have it.
    metrics_port = settings.metrics_port + index if settings.metrics_port else 0
    return (
        *("--metrics-port", str(metrics_port)),
        *(() if dtype == "auto" else ("--dtype", dtype)),
        *(() if settings.quantization == "none" else ("--quantization", settings.quantization)),
    )
