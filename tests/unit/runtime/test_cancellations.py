"""Which attempts nobody wants any more."""

from __future__ import annotations

from shared.runtime.cancellations import Cancellations


def test_every_attempt_up_to_the_cancelled_one_is_void() -> None:
    cancellations = Cancellations()
    cancellations.cancel("r", 1)
    assert [cancellations.is_cancelled("r", n) for n in range(3)] == [True, True, False]
    assert not cancellations.is_cancelled("other", 0)


def test_an_older_cancellation_takes_nothing_back() -> None:
    cancellations = Cancellations()
    cancellations.cancel("r", 2)
    cancellations.cancel("r", 0)
    assert cancellations.is_cancelled("r", 2)


def test_running_work_is_told_once_and_only_of_its_own_attempt() -> None:
    cancellations, told = Cancellations(), []
    cancellations.watch("r", 0, lambda: told.append("r0"))
    cancellations.watch("r", 1, lambda: told.append("r1"))
    cancellations.watch("s", 0, lambda: told.append("s0"))
    cancellations.cancel("r", 0)
    cancellations.cancel("r", 0)
    assert told == ["r0"]


def test_who_stopped_watching_is_not_told() -> None:
    cancellations, told = Cancellations(), []
    unwatch = cancellations.watch("r", 0, lambda: told.append(1))
    unwatch()
    unwatch()
    cancellations.cancel("r", 0)
    assert told == []


def test_memory_is_bounded_and_forgets_the_oldest() -> None:
    cancellations = Cancellations(max_remembered=2)
    for name in "abc":
        cancellations.cancel(name, 0)
    assert [cancellations.is_cancelled(name, 0) for name in "abc"] == [False, True, True]
