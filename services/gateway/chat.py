"""`POST /v1/chat/completions`: one request from its body to its answer.

Joins the parts: admission, ingest, run, and the two shapes of an answer. A request's slot, its run
and its place in the metrics end together, when the answer has been sent or the client is gone.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from functools import partial

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from services.gateway.account import Account
from services.gateway.admission import Admission, Slot
from services.gateway.answer import Advance, ToldToken
from services.gateway.choices import advances_of
from services.gateway.health import Health
from services.gateway.ingest import Ingest, Prepared
from services.gateway.metrics import GatewayMetrics
from services.gateway.openai_answers import AnswerHead, Choice, Json, Usage
from services.gateway.openai_logprobs import logprob_entries
from services.gateway.openai_schema import ChatRequest, parse_request
from services.gateway.problems import Problem, problem_of
from services.gateway.runner import Run, Runner
from services.gateway.sse import DONE, ClientGone, EventStream, event, text_events, unless_gone
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
            for _ in range(1, chat.num_choices):
                scope.enter_context(self.admission.slot())
            sources = self.ingest.check(chat)
            self.health.require(pictures=bool(sources))
            prepared = await unless_gone(
                request.receive, self.ingest.prepare(chat, sources, request_id, slot)
            )
        account.prepared(len(prepared.descriptor.prompt_token_ids))
        runs = [
            await self._run(prepared.choice(index), account, scope)
            for index in range(chat.num_choices)
        ]
        head = AnswerHead(
            request_id=request_id,
            model=chat.model,
            created_unix_s=int(prepared.descriptor.created_unix_s),
            with_usage=chat.wants_usage,
        )
        return Started(chat, tuple(runs), head, len(prepared.descriptor.prompt_token_ids))

    async def _run(self, prepared: Prepared, account: Account, scope: ExitStack) -> Run:
        run = await self.runner.start(prepared, account.watch())
        scope.callback(lambda: account.resubmitted(run.troubles))
        scope.callback(run.close)
        return run

    async def _parse(self, request: Request, slot: Slot) -> ChatRequest:
        length = request.headers.get("content-length")
        body = await self.admission.read_body(slot, request.stream(), length)
        # Parsing tens of megabytes would hold up every other request's tokens.
        return await asyncio.to_thread(parse_request, body)

    async def _whole(
        self, request: Request, started: Started, account: Account, headers: dict[str, str]
    ) -> Response:
        choices = await unless_gone(request.receive, self._collect(started))
        account.succeeded([choice.reason for choice in choices])
        body = started.head.completion(choices, started.usage)
        return JSONResponse(body, headers=headers)

    async def _collect(self, started: Started) -> list[Choice]:
        """All answers, when the last one is complete."""
        grown = [Advance()] * len(started.runs)
        async with aclosing(advances_of(started.runs)) as advances:
            async for index, advance in advances:
                grown[index] += advance
        with_ids = started.chat.return_token_ids
        return [
            Choice(
                text=whole.text,
                reason=_reason(whole),
                logprobs=self._logprobs(started, whole.told),
                token_ids=run.answer.token_ids if with_ids else None,
            )
            for whole, run in zip(grown, started.runs, strict=True)
        ]

    def _logprobs(self, started: Started, told: Sequence[ToldToken]) -> list[Json] | None:
        if started.chat.num_logprobs is None:
            return None
        return logprob_entries(told, self.runner.tokenizer)

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
            for index in range(len(started.runs)):
                yield event(head.first_chunk(index))
            texts = [
                text_events(partial(head.text_chunk, index=n)) for n in range(len(started.runs))
            ]
            reasons: list[FinishReason] = []
            async with aclosing(advances_of(started.runs)) as advances:
                async for index, advance in advances:
                    logprobs = self._logprobs(started, advance.told)
                    if logprobs:
                        yield event(head.text_chunk(advance.text, index, logprobs))
                    elif advance.text:
                        yield texts[index](advance.text)
                    if advance.end:
                        reasons.append(advance.end)
                        if len(reasons) == len(started.runs):
                            account.succeeded(reasons)
                        yield event(head.last_chunk(advance.end, index))
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


def _reason(whole: Advance) -> FinishReason:
    assert whole.end is not None, "a run ends with an end or an error"
    return whole.end


@dataclass(frozen=True)
class Started:
    """A request that the workers know of."""

    chat: ChatRequest
    runs: tuple[Run, ...]
    head: AnswerHead
    num_prompt_tokens: int

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        num_answer_tokens = sum(len(run.answer.token_ids) for run in self.runs)
        num_cached_tokens = self.runs[0].answer.num_cached_tokens
        return Usage(self.num_prompt_tokens, num_answer_tokens, num_cached_tokens)
