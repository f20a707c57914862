"""The FastAPI application: routes, and every error in OpenAI's shape."""

from __future__ import annotations

from http import HTTPStatus

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from services.gateway.problems import Problem, Refused, problem_of
from services.gateway.roles import role_routes
from services.gateway.routes import Parts, client_routes, operator_routes


def make_app(parts: Parts) -> FastAPI:
    """The application over parts that were put together elsewhere (see `gateway`)."""
    app = FastAPI(title="Triptych", docs_url="/docs", redoc_url=None)
    app.include_router(client_routes(parts))
    app.include_router(operator_routes(parts))
    app.include_router(role_routes(parts.roles, parts.access))
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Refused, _on_problem)
    app.add_exception_handler(Exception, _on_problem)
    return app


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and methods."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = error.headers if isinstance(error, HTTPException) else None
    message = f"{request.method} {request.url.path}: {HTTPStatus(status).phrase.lower()}"
    code = HTTPStatus(status).name.lower()
    return JSONResponse(Problem(status, message, code=code).body, status, headers=headers)


async def _on_problem(request: Request, error: Exception) -> Response:
    """A refusal or a defect outside of a chat request. A defect is logged, and not told."""
    problem = problem_of(error)
    return JSONResponse(problem.body, problem.status, headers=problem.headers)
