"""Who hosts which stages, and the change of it, for operators.

In: a worker's name and a role. Out: JSON that says what the switch took, or why there was none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict
from starlette.responses import JSONResponse, Response

from services.gateway.access import Access
from services.gateway.admission import read_bounded
from services.gateway.openai_schema import parse_body
from services.gateway.problems import BAD_REQUEST, SERVER_ERROR, Problem, Refused, problem_of
from services.gateway.workers import Workers
from shared.bus.base import Bus
from shared.errors import BusError
from shared.messages.control import Registration
from shared.runtime.role_control import SwitchResult, request_switch
from shared.runtime.role_rules import RefusalKind, SwitchRefused, parse_role

MAX_BODY_BYTES = 4096

_STATUS_OF = {
    RefusalKind.UNKNOWN_WORKER: 404,
    RefusalKind.UNKNOWN_ROLE: 400,
    RefusalKind.MISSING_PART: 400,
    RefusalKind.IN_PROGRESS: 409,
    RefusalKind.NOT_READY: 409,
    RefusalKind.LEAVES_UNSERVED: 409,
    RefusalKind.NO_ANSWER: 504,
    RefusalKind.FAILED: 500,
}


class RoleChange(BaseModel):
    """The body of a switch."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    role: str
    force: bool = False


@dataclass(frozen=True)
class Roles:
    """The workers' roles, over the bus."""

    bus: Bus
    workers: Workers

    def listed(self) -> list[dict[str, Any]]:
        """Every registered worker."""
        return [_entry(each) for each in self.workers.live()]

    async def change(self, worker: str, change: RoleChange) -> SwitchResult:
        """Have a worker host other stages. Raises `SwitchRefused` or a `BusError`."""
        stages = parse_role(change.role)
        return await request_switch(self.bus, self.workers, worker, stages, force=change.force)


def role_routes(roles: Roles, access: Access) -> APIRouter:
    """`GET /v1/roles` and `POST /v1/roles/WORKER`."""
    router = APIRouter(dependencies=[Depends(access.operator)])

    @router.get("/v1/roles")
    async def listed() -> Response:
        """The workers, what they host and whether they take tasks."""
        return JSONResponse({"workers": roles.listed()})

    @router.post("/v1/roles/{worker}")
    async def change(worker: str, request: Request) -> Response:
        """Switch one worker's role; answers when it takes the new stages' tasks."""
        try:
            body = await _body(request)
            result = await roles.change(worker, body)
        except SwitchRefused as error:
            return _refusal(_problem(error))
        except (Refused, BusError) as error:
            return _refusal(problem_of(error))
        return JSONResponse(
            {
                "worker": result.worker,
                "before": result.before,
                "after": result.after,
                "drain_s": round(result.drain_s, 4),
                "build_s": round(result.build_s, 4),
                "total_s": round(result.total_s, 4),
            }
        )

    return router


async def _body(request: Request) -> RoleChange:
    length = request.headers.get("content-length")
    body = await read_bounded(request.stream(), length, limit=MAX_BODY_BYTES)
    return parse_body(RoleChange, body)


def _problem(error: SwitchRefused) -> Problem:
    status = _STATUS_OF[error.kind]
    kind = SERVER_ERROR if status >= 500 else BAD_REQUEST
    return Problem(status, str(error), kind, code=error.kind.value)


def _refusal(problem: Problem) -> Response:
    return JSONResponse(problem.body, problem.status, headers=problem.headers)


def _entry(registration: Registration) -> dict[str, Any]:
    return {
        "worker": registration.worker.name,
        "stages": registration.stages,
        "ready": registration.ready,
        "model": registration.model,
        "host": registration.host,
        "pid": registration.pid,
    }
