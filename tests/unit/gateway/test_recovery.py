"""The policy, row by row."""

import pytest

from services.gateway.recovery import (
    GiveUp,
    Observation,
    RecoveryPolicy,
    Resubmit,
    Trouble,
    Unserved,
    Wait,
    decide,
)
from shared.errors import FailureKind
from shared.messages.events import FailedEvent

POLICY = RecoveryPolicy(max_attempts=3, first_event_s=100, stall_s=10, gap_s=2)


def seen(now_s: float = 50, *, attempt: int = 0, **facts) -> Observation:
    return Observation(now_s=now_s, deadline_s=600, attempt=attempt, attempt_started_s=40, **facts)


def failure(retryable: bool, kind=FailureKind.OVERLOADED) -> FailedEvent:
    return FailedEvent(request_id="r", attempt=0, kind=kind, message="why", retryable=retryable)


@pytest.mark.parametrize(
    ("observation", "until_s"),
    [
        (seen(), 140),
        (seen(last_event_s=49), 149),  # the first token is out, a decoder's turn is to come
        (seen(last_event_s=49, num_attempt_tokens=1), 149),
        (seen(last_event_s=49, num_attempt_tokens=2), 59),
        (seen(last_event_s=49, gap_since_s=49), 51),
        (seen(599, last_event_s=598), 600),
        (seen(unserved=Unserved("decode", 45)), 60),
    ],
)
def test_waits_until_the_next_bound(observation, until_s):
    assert decide(POLICY, observation) == Wait(until_s)


TROUBLES = [
    ({"failure": failure(True)}, Trouble.FAILED, FailureKind.OVERLOADED),
    ({"last_event_s": 49, "lost_worker": "d"}, Trouble.WORKER_LOST, FailureKind.WORKER_LOST),
    ({"last_event_s": 49, "gap_since_s": 48}, Trouble.GAP, FailureKind.WORKER_LOST),
    ({"last_event_s": 40, "num_attempt_tokens": 2}, Trouble.STALL, FailureKind.TIMEOUT),
    ({"now_s": 140}, Trouble.STALL, FailureKind.TIMEOUT),
]


@pytest.mark.parametrize(("facts", "trouble", "kind"), TROUBLES)
def test_trouble_is_tried_again_so_many_times(facts, trouble, kind):
    for attempt in (0, 1):
        step = decide(POLICY, seen(attempt=attempt, **facts))
        assert isinstance(step, Resubmit)
        assert step.trouble is trouble
    last = decide(POLICY, seen(attempt=2, **facts))
    assert isinstance(last, GiveUp)
    assert last.kind is kind
    assert "3 attempts" in last.message


@pytest.mark.parametrize("kind", FailureKind)
def test_a_final_failure_ends_the_request_in_its_own_words(kind):
    assert decide(POLICY, seen(failure=failure(False, kind))) == GiveUp(kind, "why")


def test_the_deadline_comes_first():
    step = decide(POLICY, seen(600, failure=failure(True), lost_worker="d"))
    assert isinstance(step, GiveUp)
    assert step.kind is FailureKind.TIMEOUT


def test_a_stage_without_workers_is_an_overload_after_a_while():
    decision = decide(POLICY, seen(60, unserved=Unserved("decode", 45)))
    assert isinstance(decision, GiveUp)
    assert decision.kind is FailureKind.OVERLOADED
    assert "decode" in decision.message


def test_giving_way_uses_up_no_attempt_but_has_its_own_bound():
    gave_way = failure(True, FailureKind.PREEMPTED)
    for times in (0, 2, 15):
        step = decide(POLICY, seen(attempt=times, num_preemptions=times, failure=gave_way))
        assert isinstance(step, Resubmit)
        assert step.trouble is Trouble.PREEMPTED
    last = decide(POLICY, seen(attempt=16, num_preemptions=16, failure=gave_way))
    assert isinstance(last, GiveUp)
    assert (last.kind, "17 times" in last.message) == (FailureKind.OVERLOADED, True)


def test_attempts_are_counted_without_those_that_gave_way():
    worse = {"num_preemptions": 5, "last_event_s": 49, "lost_worker": "d"}
    assert isinstance(decide(POLICY, seen(attempt=6, **worse)), Resubmit)
    assert isinstance(decide(POLICY, seen(attempt=7, **worse)), GiveUp)
