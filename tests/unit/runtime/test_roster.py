"""Who lives and who was lost, with literal times."""

from __future__ import annotations

from shared.messages.control import Registration, Role
from shared.messages.descriptor import WorkerRef
from shared.runtime.roster import LossReason, LostWorker, Roster

TTL_S = 10.0


def registration(
    name: str = "w",
    incarnation: int = 1,
    stages: tuple[Role, ...] = (Role.DECODE,),
    **changes: object,
) -> Registration:
    fields: dict[str, object] = {
        "worker": WorkerRef(name=name, incarnation=incarnation),
        "stages": stages,
        "model": "m",
        "compatibility": "c",
        "host": "h",
        "pid": 1,
        "ready": True,
    }
    return Registration.model_validate({**fields, **changes})


def test_live_answers_by_role_model_and_readiness() -> None:
    roster = Roster(TTL_S)
    decode, loading = registration("a"), registration("b", ready=False)
    prefill, other = registration("c", stages=(Role.PREFILL,)), registration("d", model="other")
    for each in (decode, loading, prefill, other):
        roster.heard(each.worker.name, each, 0.0)
    assert roster.live(Role.DECODE, "m") == [decode, loading]
    assert roster.live(Role.DECODE, "m", ready_only=True) == [decode]
    assert roster.live(Role.PREFILL) == [prefill]
    assert roster.live() == [decode, loading, prefill, other]


def test_heartbeats_keep_a_worker_and_silence_loses_it() -> None:
    roster = Roster(TTL_S)
    first = registration()
    roster.heard("k", first, 0.0)
    roster.heard("k", first, 8.0)
    assert roster.expire(18.0) == []
    assert roster.expire(18.1) == [LostWorker(first, LossReason.LAPSED)]
    assert roster.expire(19.0) == []
    assert roster.live() == []
    assert roster.is_gone(first.worker)


def test_a_silent_worker_may_come_back() -> None:
    roster = Roster(TTL_S)
    roster.heard("k", registration(), 0.0)
    roster.expire(20.0)
    assert roster.heard("k", registration(), 21.0) == []
    assert not roster.is_gone(registration().worker)


def test_a_later_life_replaces_and_an_earlier_one_is_ignored() -> None:
    roster = Roster(TTL_S)
    old, new = registration(incarnation=1), registration(incarnation=2)
    roster.heard("k", old, 0.0)
    assert roster.heard("k", new, 1.0) == [LostWorker(old, LossReason.REPLACED)]
    assert roster.heard("k", old, 2.0) == []
    assert roster.live() == [new]
    assert roster.is_gone(old.worker)
    assert not roster.is_gone(new.worker)


def test_a_withdrawn_worker_is_lost_once() -> None:
    roster = Roster(TTL_S)
    roster.heard("k", registration(), 0.0)
    assert [lost.reason for lost in roster.withdrawn("k")] == [LossReason.WITHDRAWN]
    assert roster.withdrawn("k") == []
    assert roster.is_gone(registration().worker)
    assert not roster.is_gone(registration(incarnation=2).worker)


def test_a_worker_never_heard_of_is_not_gone() -> None:
    assert not Roster(TTL_S).is_gone(WorkerRef(name="new", incarnation=1))


def test_a_worker_counts_for_each_stage_that_it_hosts() -> None:
    roster = Roster(TTL_S)
    both = registration(stages=(Role.PREFILL, Role.DECODE))
    roster.heard("w", both, 0.0)
    assert roster.live(Role.PREFILL) == roster.live(Role.DECODE) == [both]
    assert roster.live(Role.ENCODE) == []
    changed = registration(stages=(Role.ENCODE,))
    assert roster.heard("w", changed, 1.0) == []
    assert roster.live(Role.ENCODE) == [changed]
    assert roster.live(Role.DECODE) == []
    roster.withdrawn("w")
    assert roster.is_gone(both.worker)
