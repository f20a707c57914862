"""Which role switches are allowed, as far as registrations tell. Pure.

In: who is registered, a worker's name and the stages that it shall host. Out: its registration, or
a `SwitchRefused` that says why not. What only the worker itself knows is its own to refuse.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum

from shared.errors import SettingsError, TriptychError
from shared.messages.control import STAGES, Registration, Role
from shared.runtime.topology import LETTERS, Stages, in_order, name_of, parse_stages


class RefusalKind(StrEnum):
    """Why there is no switch."""

    UNKNOWN_WORKER = "unknown_worker"
    UNKNOWN_ROLE = "unknown_role"
    MISSING_PART = "missing_part"
    IN_PROGRESS = "switch_in_progress"
    NOT_READY = "worker_not_ready"
    LEAVES_UNSERVED = "leaves_stage_unserved"
    NO_ANSWER = "no_answer"
    FAILED = "switch_failed"


class SwitchRefused(TriptychError):
    """A role switch did not take place; the worker keeps its role unless it was lost."""

    def __init__(self, kind: RefusalKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def parse_role(text: str) -> Stages:
    """The stages that a user calls `decode`, `prefill,decode`, `prefill-decode` or `PD`."""
    letters = text.strip().upper()
    if letters and set(letters) <= set(LETTERS) and len(set(letters)) == len(letters):
        return in_order(LETTERS[letter] for letter in letters)
    try:
        return parse_stages(text.strip().lower().replace("-", ",").replace("+", ","))
    except SettingsError:
        allowed = ", ".join(stage.value for stage in STAGES)
        raise SwitchRefused(
            RefusalKind.UNKNOWN_ROLE,
            f"role = {text[:64]!r}: should name stages, each once, out of {allowed}, such as "
            "decode, prefill,decode or PD",
        ) from None


def check_switch(
    registered: Sequence[Registration], name: str, stages: Stages, *, force: bool = False
) -> Registration:
    """The worker's registration, if it may take this role. Raises `SwitchRefused`."""
    known = next((each for each in registered if each.worker.name == name), None)
    if known is None:
        names = ", ".join(sorted(each.worker.name for each in registered)) or "none"
        raise SwitchRefused(
            RefusalKind.UNKNOWN_WORKER,
            f"worker = {name[:64]!r}: no such worker is registered; there are {names}",
        )
    if not known.ready:
        raise SwitchRefused(
            RefusalKind.NOT_READY,
            f"worker {name} is not ready: it is starting, stopping or in another switch",
        )
    left = unserved_after(registered, known, stages)
    if left and not force:
        raise SwitchRefused(
            RefusalKind.LEAVES_UNSERVED,
            f"worker {name} is the only one for {name_of(left)}; without it such requests would "
            "wait and be refused (force: switch all the same)",
        )
    return known


def unserved_after(
    registered: Iterable[Registration], known: Registration, stages: Sequence[Role]
) -> Stages:
    """The stages of its model that no ready worker would host once `known` hosts `stages`."""
    others = {
        role
        for each in registered
        if each.ready and each.model == known.model and each.worker.name != known.worker.name
        for role in each.stages
    }
    return in_order(set(known.stages) - others - set(stages))
