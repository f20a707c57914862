"""When to start a process again. Pure: durations and exit codes in, a verdict out."""

from __future__ import annotations

from dataclasses import dataclass, replace

EXIT_BAD_SETTINGS = 2


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Exponential back-off that forgets old failures once a process has run for `healthy_s`."""

    first_delay_s: float = 0.5
    factor: float = 2.0
    max_delay_s: float = 30.0
    healthy_s: float = 30.0
    max_failed_starts: int = 3
    """A process that never got ready and failed this often in a row will not get ready at all."""


@dataclass(frozen=True, slots=True)
class RestartHistory:
    """What the policy remembers of one process."""

    failures: int = 0
    was_ready: bool = False

    def ready(self) -> RestartHistory:
        return replace(self, was_ready=True)


@dataclass(frozen=True, slots=True)
class Restart:
    """Start again after `delay_s`, remembering `history`."""

    delay_s: float
    history: RestartHistory


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Starting again cannot help."""

    reason: str
    is_bad_setting: bool = False


def after_exit(
    policy: RestartPolicy, history: RestartHistory, exit_code: int, ran_s: float
) -> Restart | GiveUp:
    """The verdict on a process that ended although nobody asked it to.

    `exit_code` is negative for a signal. Any end counts as a failure, 0 too: services run until
    they are told to stop.
    """
    if exit_code == EXIT_BAD_SETTINGS and not history.was_ready:
        return GiveUp("its settings are wrong", is_bad_setting=True)
    failures = 1 if ran_s >= policy.healthy_s else history.failures + 1
    if not history.was_ready and failures >= policy.max_failed_starts:
        return GiveUp(f"{failures} starts in a row have failed")
    delay_s = min(policy.first_delay_s * policy.factor ** (failures - 1), policy.max_delay_s)
    return Restart(delay_s, replace(history, failures=failures))
