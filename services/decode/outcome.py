"""What a step has given: its tokens taken into the sequences, and counted.

In: the plan of a step and its result. Out: what the gateways are told, the sequences that ended,
and the metrics. Knows nothing of the bus or of scheduling.
"""

from __future__ import annotations

from collections.abc import Iterable

from services.decode.executor import StepResult
from services.decode.plan import StepPlan
from services.decode.sequence import Sequence
from shared.errors import RequestFailed
from shared.messages.control import Role
from shared.messages.descriptor import WorkerRef
from shared.messages.events import Event, TokenEvent
from shared.runtime.step_guard import not_a_number
from shared.telemetry.metrics import DecodeMetrics


def take_in(
    batch: Iterable[Sequence], result: StepResult
) -> tuple[list[tuple[WorkerRef, Event]], list[tuple[Sequence, RequestFailed | None]]]:
    """Take in a step's tokens: what the gateways are told, and the sequences that ended and why.

    Sequences that were retired meanwhile say nothing.
    """
    events: list[tuple[WorkerRef, Event]] = []
    ended: list[tuple[Sequence, RequestFailed | None]] = []
    for sequence, tokens in zip(batch, result.tokens, strict=True):
        if sequence.retired:
            continue
        for token in tokens:
            if token is None:
                ended.append((sequence, not_a_number(Role.DECODE.value)))
                break
            told = sequence.append(token)
            events += [(sequence.gateway, event) for event in told]
            if not isinstance(told[-1], TokenEvent):
                ended.append((sequence, None))
                break
    return events, ended


def measure(metrics: DecodeMetrics, plan: StepPlan, result: StepResult) -> None:
    """Count a step's tokens, its preemptions, and how many of its drafts were right."""
    if plan.batch:
        metrics.batch_sequences.observe(len(plan.batch))
    metrics.generation_tokens.inc(sum(map(len, result.tokens)))
    if plan.saves:
        metrics.preemptions.labels("swap").inc(len(plan.saves))
    if plan.returned:
        metrics.preemptions.labels("recompute").inc(len(plan.returned))
    if not any(result.num_drafted):
        return
    metrics.drafts.inc(sum(map(bool, result.num_drafted)))
    metrics.draft_tokens.inc(sum(result.num_drafted))
    for tokens in result.tokens:
        metrics.accepted_tokens.inc(len(tokens) - 1)
        for position in range(1, len(tokens)):
            metrics.accepted_at.labels(str(position)).inc()
