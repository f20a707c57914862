"""`POST /v1/chat/completions`: one request from its body to its answer.

Joins the parts: admission, ingest, run, and the two shapes of an answer. A request's slot, its run
and its place in the metrics end together, when the answer has been sent or the client is gone.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing
from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from services.gateway.account import Account
from services.gateway.admission import Admission, Slot
from services.gateway.health import Health
from services.gateway.ingest import Ingest
from services.gateway.metrics import GatewayMetrics
from services.gateway.openai_answers import AnswerHead, Usage
from services.gateway.openai_schema import ChatRequest, parse_request
from services.gateway.problems import Problem, problem_of
from services.gateway.runner import Run, Runner
from services.gateway.sse import DONE, ClientGone, EventStream, event, unless_gone
from shared.errors import TriptychError
from shared.messages.events import FinishReason
from shared.telemetry import names, tracing

logger = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499


@dataclass(frozen=True)
class Chat:
    """What every chat request needs."""

    admission: Admission
    ingest: Ingest
    health: Health
    runner: Runner
    metrics: GatewayMetrics
    retry_after_s: int
    send_timeout_s: float

    async def answer(self, request: Request) -> Response:
        """A whole answer, a stream, or a problem; every path ends the request exactly once."""
        request_id = uuid.uuid4().hex
        account = Account(self.metrics)
        with ExitStack() as scope:
            parent = tracing.extract(request.headers)
            scope.enter_context(tracing.span(names.REQUEST, parent=parent, request_id=request_id))
            headers = {"x-request-id": request_id}
            if (trace_id := tracing.current_trace_id()) is not None:
                headers["x-trace-id"] = trace_id
            try:
                started = await self._start(request, request_id, account, scope)
                if not started.chat.stream:
                    return await self._whole(request, started, account, headers)
                return self._stream(started, account, headers, scope.pop_all())
            except (ClientGone, ClientDisconnect):
                account.disconnected()
                return Response(status_code=CLIENT_CLOSED_REQUEST, headers=headers)
            except Exception as error:
                problem = self._problem(error, request_id)
                account.failed(problem.status)
                return JSONResponse(
                    problem.body, problem.status, headers={**headers, **problem.headers}
                )

    async def _start(
        self, request: Request, request_id: str, account: Account, scope: ExitStack
    ) -> Started:
        slot = scope.enter_context(self.admission.slot())
        with tracing.span(names.INGEST):
            chat = await self._parse(request, slot)
            sources = self.ingest.check(chat)
            self.health.require(pictures=bool(sources))
            prepared = await unless_gone(
                request.receive, self.ingest.prepare(chat, sources, request_id, slot)
            )
        account.prepared(len(prepared.descriptor.prompt_token_ids))
        run = await self.runner.start(prepared, account.on_advance)
        scope.callback(lambda: account.resubmitted(run.troubles))
        scope.callback(run.close)
        head = AnswerHead(
            request_id=request_id,
            model=chat.model,
            created_unix_s=int(prepared.descriptor.created_unix_s),
            with_usage=chat.wants_usage,
        )
        return Started(chat, run, head, len(prepared.descriptor.prompt_token_ids))

    async def _parse(self, request: Request, slot: Slot) -> ChatRequest:
        length = request.headers.get("content-length")
        body = await self.admission.read_body(slot, request.stream(), length)
        # Parsing tens of megabytes would hold up every other request's tokens.
        return await asyncio.to_thread(parse_request, body)

    async def _whole(
        self, request: Request, started: Started, account: Account, headers: dict[str, str]
    ) -> Response:
        text, reason = await unless_gone(request.receive, _collect(started.run))
        account.succeeded(reason)
        token_ids = started.run.answer.token_ids if started.chat.return_token_ids else None
        body = started.head.completion(text, reason, started.usage, token_ids)
        return JSONResponse(body, headers=headers)

    def _stream(
        self, started: Started, account: Account, headers: dict[str, str], scope: ExitStack
    ) -> Response:
        def on_end(error: BaseException | None) -> None:
            account.disconnected()  # ignored where the answer had ended
            scope.close()

        return EventStream(
            self._events(started, account),
            headers=headers,
            send_timeout_s=self.send_timeout_s,
            on_end=on_end,
        )

    async def _events(self, started: Started, account: Account) -> AsyncGenerator[bytes, None]:
        """The stream's events. A failure is one error event, and never a finish reason."""
        head = started.head
        try:
            yield event(head.first_chunk())
            async with aclosing(started.run.advances()) as advances:
                async for advance in advances:
                    if advance.text:
                        yield event(head.text_chunk(advance.text))
                    if advance.end:
                        account.succeeded(advance.end)
                        yield event(head.last_chunk(advance.end))
            if head.with_usage:
                yield event(head.usage_chunk(started.usage))
        except Exception as error:
            problem = self._problem(error, head.request_id)
            account.failed(problem.status)
            yield event(problem.body)
        yield DONE

    def _problem(self, error: Exception, request_id: str) -> Problem:
        """What the client is told; a defect's own words and trace stay in the log."""
        if not isinstance(error, TriptychError):
            logger.error("request %s failed unexpectedly", request_id, exc_info=error)
        return problem_of(error, retry_after_s=self.retry_after_s)


@dataclass(frozen=True)
class Started:
    """A request that the workers know of."""

    chat: ChatRequest
    run: Run
    head: AnswerHead
    num_prompt_tokens: int

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(self.num_prompt_tokens, len(self.run.answer.token_ids))


async def _collect(run: Run) -> tuple[str, FinishReason]:
    """The whole text and why it ended."""
    pieces: list[str] = []
    async with aclosing(run.advances()) as advances:
        async for advance in advances:
            pieces.append(advance.text)
            if advance.end:
                return "".join(pieces), advance.end
    raise AssertionError("a run ends with an end or an error")
