"""What to do when an attempt fails, a worker vanishes, events are missing or nothing comes. Pure.

In: what was observed of one request. Out: wait, try again, or give up with one typed error. The
gateway knows every token that reached the client, so a new attempt carries on at the next index.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from shared.errors import FailureKind
from shared.messages.events import FailedEvent


class Trouble(StrEnum):
    """Why an attempt was given up; also a metric's label."""

    FAILED = "failed"
    PREEMPTED = "preempted"
    WORKER_LOST = "worker_lost"
    GAP = "gap"
    STALL = "stall"


@dataclass(frozen=True, slots=True)
class RecoveryPolicy:
    """Bounds. `first_event_s` covers the time in one queue, so it is larger than `stall_s`.

    An attempt that gave way to others, for want of memory, is no failed one and counts apart.
    """

    max_attempts: int = 3
    max_preemptions: int = 16
    first_event_s: float = 120.0
    stall_s: float = 30.0
    gap_s: float = 2.0
    unserved_s: float = 15.0


@dataclass(frozen=True, slots=True)
class Unserved:
    """A stage that the request still needs has had no live worker since then."""

    stage: str
    since_s: float


@dataclass(frozen=True, slots=True)
class Observation:
    """One request at one moment; times are in seconds on one clock, `now_s` included.

    `last_event_s` is None until the attempt's first event. `lost_worker` names the worker that
    sent the newest event if it is registered no longer.
    """

    now_s: float
    deadline_s: float
    attempt: int
    attempt_started_s: float
    num_preemptions: int = 0
    last_event_s: float | None = None
    num_attempt_tokens: int = 0
    gap_since_s: float | None = None
    lost_worker: str | None = None
    unserved: Unserved | None = None
    failure: FailedEvent | None = None


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do before `until_s` unless an event comes."""

    until_s: float


@dataclass(frozen=True, slots=True)
class Resubmit:
    """Cancel this attempt and start the next."""

    trouble: Trouble
    detail: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """End the request with this error."""

    kind: FailureKind
    message: str


def decide(policy: RecoveryPolicy, seen: Observation) -> Wait | Resubmit | GiveUp:
    """The next step of one request."""
    if seen.now_s >= seen.deadline_s:
        return GiveUp(FailureKind.TIMEOUT, "the request's time is over")
    if seen.failure is not None and not seen.failure.retryable:
        return GiveUp(seen.failure.kind, seen.failure.message)
    if seen.unserved is not None and seen.now_s >= seen.unserved.since_s + policy.unserved_s:
        return GiveUp(
            FailureKind.OVERLOADED, f"no live worker for {seen.unserved.stage}; try again later"
        )
    found = _trouble(policy, seen)
    if found is None:
        return Wait(_next_check_s(policy, seen))
    if found.trouble is Trouble.PREEMPTED:
        if seen.num_preemptions < policy.max_preemptions:
            return found
        return GiveUp(
            FailureKind.OVERLOADED,
            f"the answer gave way to others {seen.num_preemptions + 1} times; try again later",
        )
    if seen.attempt - seen.num_preemptions + 1 < policy.max_attempts:
        return found
    kind = seen.failure.kind if seen.failure else _KIND_OF[found.trouble]
    return GiveUp(kind, f"{found.detail} ({policy.max_attempts} attempts were made)")


_KIND_OF = {
    Trouble.FAILED: FailureKind.INTERNAL,
    Trouble.WORKER_LOST: FailureKind.WORKER_LOST,
    Trouble.GAP: FailureKind.WORKER_LOST,
    Trouble.STALL: FailureKind.TIMEOUT,
}


def _trouble(policy: RecoveryPolicy, seen: Observation) -> Resubmit | None:
    if seen.failure is not None:
        is_preempted = seen.failure.kind is FailureKind.PREEMPTED
        trouble = Trouble.PREEMPTED if is_preempted else Trouble.FAILED
        return Resubmit(trouble, seen.failure.message)
    if seen.lost_worker is not None:
        return Resubmit(Trouble.WORKER_LOST, f"worker {seen.lost_worker} was lost")
    if seen.gap_since_s is not None and seen.now_s >= seen.gap_since_s + policy.gap_s:
        return Resubmit(Trouble.GAP, "tokens of the answer were lost on the way")
    if seen.now_s >= _silent_until_s(policy, seen):
        return Resubmit(Trouble.STALL, "the workers fell silent")
    return None


def _silent_until_s(policy: RecoveryPolicy, seen: Observation) -> float:
    if seen.last_event_s is None:
        return seen.attempt_started_s + policy.first_event_s
    # The first token comes from prefill; the wait for a decoder's turn is still to come.
    is_decoding = seen.num_attempt_tokens > 1
    return seen.last_event_s + (policy.stall_s if is_decoding else policy.first_event_s)


def _next_check_s(policy: RecoveryPolicy, seen: Observation) -> float:
    gap_s = seen.gap_since_s + policy.gap_s if seen.gap_since_s is not None else seen.deadline_s
    unserved_s = seen.unserved.since_s + policy.unserved_s if seen.unserved else seen.deadline_s
    return min(seen.deadline_s, _silent_until_s(policy, seen), gap_s, unserved_s)
