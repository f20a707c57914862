"""The state machine of a role switch, and the rules of who may switch."""

from __future__ import annotations

import pytest

from shared.messages.control import Registration, Role, RolePhase, RoleRequest
from shared.messages.descriptor import WorkerRef
from shared.runtime.role_rules import RefusalKind, SwitchRefused, check_switch, parse_role
from shared.runtime.role_switch import MAX_REMEMBERED, RoleSwitch
from tests.support.registrations import registered

ME = WorkerRef(name="w", incarnation=7)
E, P, D = Role.ENCODE, Role.PREFILL, Role.DECODE


def request(switch_id: str, *stages: Role, worker: WorkerRef = ME) -> RoleRequest:
    return RoleRequest(switch_id=switch_id, worker=worker, stages=stages)


def machine(*, has_tower: bool = True) -> RoleSwitch:
    return RoleSwitch(ME, (D,), has_tower=has_tower)


def test_a_switch_goes_through_its_phases_and_says_what_each_took() -> None:
    switch = machine()
    assert switch.asked(request("a", P), 1.0).phase is RolePhase.DRAINING
    assert switch.stages == (D,)
    report = switch.drained(1.5)
    assert (report.phase, report.drain_s, report.stages) == (RolePhase.BUILDING, 0.5, (D,))
    report = switch.built(1.75)
    assert (report.phase, report.drain_s, report.build_s) == (RolePhase.DONE, 0.5, 0.25)
    assert (switch.stages, report.stages, switch.is_under_way) == ((P,), (P,), False)


def test_a_copy_of_a_request_gets_the_newest_report_and_begins_nothing() -> None:
    switch = machine()
    switch.asked(request("a", P), 0.0)
    switch.drained(1.0)
    assert switch.asked(request("a", P), 1.1).phase is RolePhase.BUILDING
    switch.built(2.0)
    assert switch.asked(request("a", P), 9.0).phase is RolePhase.DONE
    assert not switch.is_under_way


def test_one_switch_at_a_time_and_a_refused_one_stays_refused() -> None:
    switch = machine()
    switch.asked(request("a", P), 0.0)
    assert switch.asked(request("b", E), 0.1).phase is RolePhase.REFUSED_BUSY
    switch.drained(0.2)
    switch.built(0.3)
    assert switch.asked(request("b", E), 0.4).phase is RolePhase.REFUSED_BUSY
    assert not switch.is_under_way


def test_another_worker_or_an_earlier_life_is_not_meant() -> None:
    switch = machine()
    for other in (WorkerRef(name="v", incarnation=7), WorkerRef(name="w", incarnation=6)):
        assert switch.asked(request("a", P, worker=other), 0.0) is None
    assert not switch.is_under_way


def test_what_the_model_or_a_worker_cannot_do_is_refused() -> None:
    switch = machine(has_tower=False)
    assert switch.asked(request("a", E, P), 0.0).phase is RolePhase.REFUSED_PART
    assert switch.asked(request("b", Role.GATEWAY), 0.0).phase is RolePhase.REFUSED_PART
    assert not switch.is_under_way


def test_the_role_that_it_has_is_done_at_once() -> None:
    switch = machine()
    assert switch.asked(request("a", D), 0.0).phase is RolePhase.DONE
    assert not switch.is_under_way


def test_after_a_failure_the_old_role_stays_and_another_switch_may_begin() -> None:
    switch = machine()
    switch.asked(request("a", E), 0.0)
    switch.drained(1.0)
    report = switch.failed("no memory", 2.0)
    assert (report.phase, report.stages, report.detail) == (RolePhase.FAILED, (D,), "no memory")
    assert switch.asked(request("b", P), 3.0).phase is RolePhase.DRAINING


def test_answers_are_remembered_within_bounds_and_the_running_one_always() -> None:
    switch = machine()
    switch.asked(request("a", P), 0.0)
    for number in range(3 * MAX_REMEMBERED):
        switch.asked(request(f"b{number}", E), 0.0)
    assert len(switch._answers) == MAX_REMEMBERED
    assert switch.drained(1.0).switch_id == "a"


@pytest.mark.parametrize(
    ("others", "stages", "kind"),
    [
        ([], (P,), RefusalKind.LEAVES_UNSERVED),
        ([registered("v", D, ready=False)], (P,), RefusalKind.LEAVES_UNSERVED),
        ([registered("v", D, model="other")], (P,), RefusalKind.LEAVES_UNSERVED),
        ([registered("v", P, D)], (P,), None),
        ([], (P, D), None),
    ],
)
def test_a_stage_keeps_a_worker_unless_forced(
    others: list[Registration], stages: tuple[Role, ...], kind: RefusalKind | None
) -> None:
    known = registered("w", D)
    assert check_switch([known, *others], "w", stages, force=True) == known
    if kind is None:
        assert check_switch([known, *others], "w", stages) == known
        return
    with pytest.raises(SwitchRefused, match="only one for decode") as refused:
        check_switch([known, *others], "w", stages)
    assert refused.value.kind is kind


def test_unknown_and_unready_workers_are_refused() -> None:
    with pytest.raises(SwitchRefused, match="'x': no such worker is registered; there are w"):
        check_switch([registered("w", D)], "x", (P,))
    with pytest.raises(SwitchRefused) as refused:
        check_switch([registered("w", D, ready=False)], "w", (P,), force=True)
    assert refused.value.kind is RefusalKind.NOT_READY


def test_roles_are_named_by_stages_or_letters() -> None:
    for text in ("PD", "dp", "prefill,decode", "decode-prefill", " Prefill+Decode "):
        assert parse_role(text) == (P, D)
    for text in ("", "gateway", "PP", "X", "prefill,,x", "prefill prefill"):
        with pytest.raises(SwitchRefused) as refused:
            parse_role(text)
        assert refused.value.kind is RefusalKind.UNKNOWN_ROLE
