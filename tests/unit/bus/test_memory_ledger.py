"""The queue's memory, with literal times."""

from __future__ import annotations

from shared.bus.limits import BusLimits
from shared.bus.memory_ledger import TaskLedger

LIMITS = BusLimits(
    queue_max_msgs=3, queue_max_bytes=10, ack_wait_s=10, duplicate_window_s=5, task_max_age_s=100
)


def ledger_of(*names: str, now_s: float = 0.0) -> TaskLedger:
    ledger = TaskLedger(LIMITS)
    for name in names:
        assert ledger.put(name.encode(), {}, name, now_s)
    return ledger


def taken(ledger: TaskLedger, max_count: int, now_s: float) -> list[tuple[bytes, int]]:
    return [(claim.data, claim.num_delivered) for claim in ledger.take(max_count, now_s)]


def test_tasks_come_in_order_and_hide_until_their_ack_is_overdue() -> None:
    ledger = ledger_of("a", "b")
    assert taken(ledger, 1, 1.0) == [(b"a", 1)]
    assert taken(ledger, 5, 2.0) == [(b"b", 1)]
    assert taken(ledger, 5, 10.9) == []
    assert ledger.next_due_s() == 11.0
    assert taken(ledger, 5, 12.0) == [(b"a", 2), (b"b", 2)]


def test_ending_a_task_frees_its_room_whichever_delivery_ends_it() -> None:
    ledger = ledger_of("a", "b", "c")
    assert not ledger.put(b"d", {}, "d", 0.0)
    (first,) = ledger.take(1, 0.0)
    ledger.take(1, 11.0)
    ledger.end(first)
    ledger.end(first)
    assert len(ledger) == 2
    assert ledger.put(b"d", {}, "d", 11.0)


def test_bytes_are_bounded() -> None:
    ledger = ledger_of("12345")
    assert not ledger.put(b"123456", {}, "x", 0.0)
    assert ledger.put(b"12345", {}, "y", 0.0)


def test_an_id_is_remembered_for_the_duplicate_window() -> None:
    ledger = ledger_of("a")
    ledger.end(ledger.take(1, 0.0)[0])
    assert ledger.put(b"a", {}, "a", 4.9)
    assert len(ledger) == 0
    assert ledger.put(b"a", {}, "a", 5.0)
    assert len(ledger) == 1


def test_giving_back_makes_visible_and_a_late_one_changes_nothing() -> None:
    ledger = ledger_of("a")
    (first,) = ledger.take(1, 0.0)
    ledger.give_back(first, 1.0, delay_s=2.0)
    assert taken(ledger, 1, 2.9) == []
    assert taken(ledger, 1, 3.0) == [(b"a", 2)]
    ledger.give_back(first, 4.0, delay_s=0.0)
    assert taken(ledger, 1, 4.0) == []


def test_work_in_progress_is_not_redelivered() -> None:
    ledger = ledger_of("a")
    (claim,) = ledger.take(1, 0.0)
    ledger.restart_timer(claim, 9.0)
    assert taken(ledger, 1, 18.0) == []
    assert taken(ledger, 1, 19.0) == [(b"a", 2)]


def test_tasks_that_nobody_takes_vanish() -> None:
    ledger = ledger_of("a", "b")
    assert taken(ledger, 5, 100.0) == []
    assert len(ledger) == 0
    assert ledger.next_due_s() is None
