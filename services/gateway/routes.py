"""The HTTP routes. Each says what it answers; the work is done elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from services.gateway.access import Access
from services.gateway.chat import Chat
from services.gateway.health import Health
from services.gateway.metrics import CONTENT_TYPE, GatewayMetrics
from services.gateway.openai_answers import model_list
from services.gateway.openai_schema import ChatRequest
from services.gateway.problems import Problem
from services.gateway.roles import Roles
from services.gateway.traces import TraceStore

# The body is read by hand, within limits; this is for the API's own description.
_CHAT_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": ChatRequest.model_json_schema()}},
    }
}


@dataclass(frozen=True)
class Parts:
    """What the routes are made of."""

    chat: Chat
    health: Health
    metrics: GatewayMetrics
    traces: TraceStore
    roles: Roles
    access: Access
    started_unix_s: int


def client_routes(parts: Parts) -> APIRouter:
    """The OpenAI API, and the traces of what was asked."""
    router = APIRouter(dependencies=[Depends(parts.access.client)])

    @router.post("/v1/chat/completions", openapi_extra=_CHAT_BODY)
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation, whole or as a stream of server-sent events."""
        return await parts.chat.answer(request)

    @router.get("/v1/models")
    async def models() -> Response:
        """The one model that is served here."""
        model = parts.health.model
        return JSONResponse(model_list(model.name, parts.started_unix_s, model.max_context_tokens))

    @router.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> Response:
        """One model, or a 404."""
        served = parts.health.model
        if model_id != served.name:
            return _not_found(f"model {model_id!r} is not served here", "model_not_found")
        listed = model_list(served.name, parts.started_unix_s, served.max_context_tokens)
        return JSONResponse(listed["data"][0])

    @router.get("/v1/traces/{trace_id}")
    async def trace(trace_id: str) -> Response:
        """The spans of one request, in order of their start."""
        spans = parts.traces.get(trace_id)
        if spans is None:
            return _not_found(f"trace {trace_id!r} is not known", "trace_not_found")
        return JSONResponse([span.model_dump() for span in spans])

    return router


def operator_routes(parts: Parts) -> APIRouter:
    """Health and metrics, for probes inside the cluster: they need no key."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        """The process lives."""
        return JSONResponse({"status": "ok"})

    @router.get("/ready")
    async def ready() -> Response:
        """Whether every stage has a worker; says which has not."""
        status, body = parts.health.report()
        return JSONResponse(body, status)

    @router.get("/metrics")
    async def metrics() -> Response:
        """Prometheus' exposition format."""
        return Response(parts.metrics.text(), headers={"content-type": CONTENT_TYPE})

    return router


def _not_found(message: str, code: str) -> Response:
    return JSONResponse(Problem(404, message, code=code).body, 404)
