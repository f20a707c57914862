"""The gateway's routes for roles: refusals name what is wrong, a worker's end is passed on."""

from __future__ import annotations

import asyncio

import pytest

from shared.bus import subjects
from shared.messages.control import Registration, Role, RolePhase, RoleReport, RoleRequest
from shared.messages.descriptor import WorkerRef


def registered(name: str, role: Role, *, ready: bool = True) -> Registration:
    return Registration(
        worker=WorkerRef(name=name, incarnation=3),
        stages=(role,),
        model="demo",
        compatibility="c",
        host="h",
        pid=1,
        ready=ready,
    )


WORKERS = [
    registered("d0", Role.DECODE),
    registered("d1", Role.DECODE),
    registered("d2", Role.DECODE, ready=False),
    registered("p0", Role.PREFILL),
]


@pytest.mark.parametrize(
    ("worker", "body", "status", "code"),
    [
        ("x", {"role": "decode"}, 404, "unknown_worker"),
        ("d0", {"role": "gateway"}, 400, "unknown_role"),
        ("d0", {"role": 3}, 400, "invalid_value"),
        ("d0", {"rolle": "decode"}, 400, "invalid_value"),
        ("d0", {"role": "P" * 5000}, 413, "body_too_large"),
        ("d2", {"role": "prefill"}, 409, "worker_not_ready"),
        ("p0", {"role": "decode"}, 409, "leaves_stage_unserved"),
    ],
)
async def test_what_cannot_be_is_refused(
    start, worker: str, body: dict, status: int, code: str | None
) -> None:
    async with start() as system:
        system.workers.registered = WORKERS
        response = await system.client.post(f"/v1/roles/{worker}", json=body)
        assert response.status_code == status, response.text
        error = response.json()["error"]
        assert error["code"] == code
        assert error["message"]


@pytest.mark.parametrize(
    ("phase", "status", "code"),
    [
        (RolePhase.DONE, 200, None),
        (RolePhase.REFUSED_BUSY, 409, "switch_in_progress"),
        (RolePhase.REFUSED_PART, 400, "missing_part"),
        (RolePhase.FAILED, 500, "switch_failed"),
    ],
)
async def test_a_workers_end_is_passed_on(
    start, phase: RolePhase, status: int, code: str | None
) -> None:
    async with start() as system:
        system.workers.registered = WORKERS
        bus = system.workers.bus

        async def on_request(request: RoleRequest, headers: object) -> None:
            assert request.worker == WORKERS[0].worker
            report = RoleReport(
                switch_id=request.switch_id,
                worker=request.worker,
                phase=phase,
                stages=request.stages,
                build_s=0.25,
                detail="so it is",
            )
            await bus.publish(subjects.ROLE_REPORTS, report)
            if phase is RolePhase.DONE:  # its registration comes after its report
                await asyncio.sleep(0.05)
                changed = WORKERS[0].model_copy(update={"stages": request.stages})
                system.workers.registered = [changed, *WORKERS[1:]]

        await bus.subscribe(subjects.ROLE, RoleRequest, on_request)
        response = await system.client.post("/v1/roles/d0", json={"role": "P"})
        assert response.status_code == status
        body = response.json()
        if code is None:
            assert (body["before"], body["after"]) == (["decode"], ["prefill"])
            assert body["build_s"] == 0.25
            assert system.workers.live()[0].stages == (Role.PREFILL,)
        else:
            assert body["error"]["code"] == code


async def test_workers_are_listed(start) -> None:
    async with start() as system:
        system.workers.registered = WORKERS
        listed = (await system.client.get("/v1/roles")).json()["workers"]
        assert [(each["worker"], each["stages"], each["ready"]) for each in listed][2:] == [
            ("d2", ["decode"], False),
            ("p0", ["prefill"], True),
        ]
