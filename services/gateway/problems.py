"""Errors as OpenAI clients expect them, and the one mapping from our errors to HTTP.

In: any exception. Out: a `Problem` with a status, a type, a message and, where one is to blame, the
parameter. Defects become a plain 500: their text and stack trace stay in the log.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shared.errors import BusError, FailureKind, QueueFull, RequestFailed, TriptychError

BAD_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"


@dataclass(frozen=True, slots=True)
class Problem:
    """One refusal or failure. `retry_after_s` invites the client to try again."""

    status: int
    message: str
    type: str = BAD_REQUEST
    param: str | None = None
    code: str | None = None
    retry_after_s: int | None = None

    @property
    def body(self) -> dict[str, Any]:
        """`{"error": ...}`, for a JSON answer and for an event inside a stream."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        if self.status == 401:
            return {"www-authenticate": "Bearer"}
        return {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}


class Refused(TriptychError):
    """The gateway answers a request with this problem and does no work for it."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def refuse(message: str, *, param: str | None = None, code: str | None = None) -> Refused:
    """A 400 that blames a parameter."""
    return Refused(Problem(400, message, param=param, code=code))


def overloaded(message: str, retry_after_s: int) -> Refused:
    """A 503 that asks to try again."""
    return Refused(
        Problem(503, message, SERVER_ERROR, code="overloaded", retry_after_s=retry_after_s)
    )


_STATUS_OF = {
    FailureKind.BAD_REQUEST: 400,
    FailureKind.TIMEOUT: 504,
    FailureKind.MEDIA_MISSING: 503,
    FailureKind.WORKER_LOST: 503,
    FailureKind.OVERLOADED: 503,
    FailureKind.PREEMPTED: 503,
    FailureKind.INTERNAL: 500,
}


def problem_of(error: Exception, *, retry_after_s: int = 1) -> Problem:
    """What the client is told of an error."""
    match error:
        case Refused():
            return error.problem
        case RequestFailed():
            status = _STATUS_OF[error.kind]
            return Problem(
                status,
                error.message,
                BAD_REQUEST if status == 400 else SERVER_ERROR,
                code=error.kind.value,
                retry_after_s=retry_after_s if status == 503 else None,
            )
        case QueueFull():
            message = "the work queue is full, try again later"
            return overloaded(message, retry_after_s).problem
        case BusError():
            message = "the message bus cannot be reached, try again later"
            return Problem(503, message, SERVER_ERROR, code="bus", retry_after_s=retry_after_s)
        case _:
            return Problem(500, "internal error of the gateway", SERVER_ERROR, code="internal")
