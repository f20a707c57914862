"""The lease book against a model: freed exactly once, never early, never while it is sent."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shared.errors import Outcome, TransferError
from shared.transport import lease
from shared.transport.lease import STANDING, LeaseBook

IDS = st.sampled_from(["l1", "l2", "l3"])
HOLDERS = st.sampled_from(["h1", "h2", "h3"])
LEASE_S = 10.0


class LeaseMachine(RuleBasedStateMachine):
    """Any sequence of calls. The model keeps holders, expiry and sends of every life of a lease."""

    def __init__(self) -> None:
        super().__init__()
        self.book = LeaseBook(LEASE_S)
        self.now = 0.0
        self.holders: dict[str, set[str]] = {}  # of open leases
        self.expires: dict[str, float] = {}
        self.sends: dict[str, int] = {}  # of leases whose memory is in use

    def _closed(self, lease_id: str, freed: bool) -> None:
        self.holders.pop(lease_id)
        self.expires.pop(lease_id)
        assert freed == (self.sends[lease_id] == 0)
        if freed:
            del self.sends[lease_id]

    @rule(lease_id=IDS, holders=st.sets(HOLDERS, min_size=1))
    def open(self, lease_id: str, holders: set[str]) -> None:
        if lease_id in self.sends:
            with pytest.raises(ValueError, match="in use"):
                self.book.open(lease_id, holders, self.now)
            return
        self.book.open(lease_id, holders, self.now)
        self.holders[lease_id] = set(holders)
        self.expires[lease_id] = self.now + LEASE_S
        self.sends[lease_id] = 0

    @rule(holders=st.sets(HOLDERS))
    def extend(self, holders: set[str]) -> None:
        self.book.extend(holders, self.now)
        for lease_id, held_by in self.holders.items():
            if held_by & holders:
                self.expires[lease_id] = self.now + LEASE_S

    @rule(lease_id=IDS, holder=HOLDERS)
    def release(self, lease_id: str, holder: str) -> None:
        freed = self.book.release(lease_id, holder)
        held_by = self.holders.get(lease_id, set())
        if held_by == {holder}:
            self._closed(lease_id, freed)
        else:
            assert not freed
            held_by.discard(holder)

    @rule(lease_id=IDS)
    def revoke(self, lease_id: str) -> None:
        freed = self.book.revoke(lease_id)
        if lease_id in self.holders:
            self._closed(lease_id, freed)
        else:
            assert not freed

    @rule(passed_s=st.floats(0, 12))
    def expire(self, passed_s: float) -> None:
        self.now += passed_s
        freed = self.book.expire(self.now)
        lapsed = [lease_id for lease_id, at in self.expires.items() if at <= self.now]
        assert set(freed) <= set(lapsed)
        for lease_id in lapsed:
            self._closed(lease_id, lease_id in freed)

    @rule(lease_id=IDS)
    def begin_send(self, lease_id: str) -> None:
        if lease_id in self.holders:
            self.book.begin_send(lease_id, self.now)
            self.sends[lease_id] += 1
        else:
            with pytest.raises(TransferError):
                self.book.begin_send(lease_id, self.now)

    @precondition(lambda self: any(self.sends.values()))
    @rule(data=st.data())
    def end_send(self, data: st.DataObject) -> None:
        lease_id = data.draw(st.sampled_from([key for key, num in self.sends.items() if num]))
        freed = self.book.end_send(lease_id)
        self.sends[lease_id] -= 1
        assert freed == (lease_id not in self.holders and self.sends[lease_id] == 0)
        if freed:
            del self.sends[lease_id]

    @invariant()
    def agrees(self) -> None:
        assert self.book.num_open == len(self.holders)
        assert all(lease_id in self.book for lease_id in self.sends)


LeaseMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLeaseMachine = LeaseMachine.TestCase


@pytest.mark.parametrize(
    ("end", "outcome"),
    [
        (lambda book: book.release("lease", "a"), Outcome.MISSING),
        (lambda book: book.revoke("lease"), Outcome.CANCELLED),
        (lambda book: book.expire(100.0), Outcome.EXPIRED),
        (lambda book: None, Outcome.EXPIRED),
    ],
)
def test_a_late_receiver_learns_why(end, outcome: Outcome) -> None:
    book = LeaseBook(30.0)
    book.open("lease", ["a"], 0.0)
    end(book)
    with pytest.raises(TransferError) as failure:
        book.begin_send("lease", 100.0)
    assert failure.value.outcome is outcome


def test_a_lease_needs_a_holder_and_a_length() -> None:
    with pytest.raises(ValueError, match="holder"):
        LeaseBook().open("lease", [], 0.0)
    with pytest.raises(ValueError, match="longer"):
        LeaseBook(0.0)


def test_memory_of_ended_leases_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "MAX_REMEMBERED", 3)
    book = LeaseBook()
    for index in range(10):
        book.open(f"lease-{index}", ["a"], 0.0)
        book.revoke(f"lease-{index}")
    assert len(book._ended) == 3
    assert not book._held_by
    with pytest.raises(TransferError, match="unknown"):
        book.begin_send("lease-0", 0.0)


def test_a_standing_lease_lasts_until_it_is_revoked_and_counts_as_nobodys() -> None:
    book = LeaseBook(lease_s=30.0)
    book.open("offer", [STANDING], 0.0)
    assert book.num_open == 0
    assert book.expire(1e12) == ()
    book.begin_send("offer", 1e12)
    assert not book.revoke("offer")  # the memory is still being read
    assert book.end_send("offer")
    with pytest.raises(TransferError, match="was revoked"):
        book.begin_send("offer", 1e12)
