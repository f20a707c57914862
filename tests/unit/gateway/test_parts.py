"""The small pure parts: problems, schema, admission, traces, metrics of one request."""

import json

import pytest

from services.gateway.account import Account
from services.gateway.admission import Admission
from services.gateway.answer import Advance
from services.gateway.metrics import GatewayMetrics
from services.gateway.openai_schema import parse_request
from services.gateway.problems import Refused, problem_of
from services.gateway.settings import AdmissionSettings, TraceSettings
from services.gateway.traces import TraceStore
from shared.errors import BusError, FailureKind, QueueFull, RequestFailed
from shared.messages.events import FinishReason
from shared.messages.telemetry import SpanRecord

BODY = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


def parse(**fields):
    return parse_request(json.dumps(BODY | fields).encode())


@pytest.mark.parametrize("kind", FailureKind)
def test_every_failure_has_a_status(kind):
    problem = problem_of(RequestFailed(kind, "why"))
    assert 400 <= problem.status < 600
    assert problem.message == "why"
    assert (problem.retry_after_s is None) == (problem.status != 503)


def test_a_defect_tells_nothing():
    assert "secret" not in str(problem_of(ValueError("secret")).body)
    assert problem_of(ValueError("secret")).status == 500
    assert problem_of(QueueFull("x"), retry_after_s=7).headers == {"retry-after": "7"}
    assert problem_of(BusError("nats://user:password@host")).status == 503
    assert "password" not in problem_of(BusError("nats://user:password@host")).message


def test_the_newer_name_of_the_token_limit_wins():
    assert parse(max_tokens=5).token_limit == 5
    assert parse(max_tokens=5, max_completion_tokens=7).token_limit == 7
    assert parse().token_limit is None


def test_stops_come_as_string_or_list():
    assert parse(stop="a").stops == ("a",)
    assert parse(stop=["a", "b"]).stops == ("a", "b")
    assert parse(stop=None).stops == parse().stops == ()


@pytest.mark.parametrize("fields", [{"tools": [{}]}, {"function_call": {"name": "f"}}])
def test_only_the_neutral_value_of_what_is_not_implemented(fields):
    with pytest.raises(Refused, match="not supported here"):
        parse(**fields)


def test_null_is_as_good_as_absent():
    names = ("n", "logprobs", "tools", "temperature", "seed", "stream", "stream_options", "user")
    assert parse(**dict.fromkeys(names)) == parse()


async def chunks(*sizes):
    for size in sizes:
        yield b"x" * size


async def test_a_slot_gives_everything_back():
    admission = Admission(AdmissionSettings(max_body_bytes=2048, max_held_bytes=3000))
    with admission.slot() as slot:
        assert len(await admission.read_body(slot, chunks(1000, 1000), None)) == 2000
        with admission.slot() as other, pytest.raises(Refused, match="hold 2000 bytes"):
            await admission.read_body(other, chunks(1500), None)
        assert (admission.num_in_flight, admission.held_bytes) == (1, 2000)
        with pytest.raises(Refused, match="the limit is 2048"):
            await admission.read_body(slot, chunks(2049), None)
        with pytest.raises(Refused, match="9999 bytes or more"):
            await admission.read_body(slot, chunks(), "9999")
    assert (admission.num_in_flight, admission.held_bytes) == (0, 0)


def span(trace: int, start: int) -> SpanRecord:
    return SpanRecord(
        trace_id=f"{trace:032x}",
        span_id=f"{start:016x}",
        parent_id=None,
        name="n",
        service="s",
        instance="i",
        start_unix_ns=start,
        end_unix_ns=start + 1,
    )


def test_traces_are_bounded_and_sorted():
    store = TraceStore(TraceSettings(max_traces=2, max_spans=3))
    for start in (3, 1, 2, 4):
        store.add(span(1, start))
    assert [s.start_unix_ns for s in store.get(f"{1:032X}")] == [1, 2, 3]
    store.add(span(2, 1))
    store.add(span(1, 9))
    store.add(span(3, 1))
    assert store.get(f"{2:032x}") is None
    assert store.get(f"{1:032x}") is not None


def value(metrics: GatewayMetrics, name: str) -> float:
    found = metrics.registry.get_sample_value(f"triptych_{name}")
    assert found is not None
    return found


def test_latencies_of_one_request():
    metrics, times = GatewayMetrics(), iter([10.0, 14.0])
    account = Account(metrics, clock=lambda: next(times))
    on_advance = account.watch()
    on_advance(Advance("a", 1), 11.0)
    on_advance(Advance("b", 2), 12.0)
    on_advance(Advance(), 13.0)
    account.succeeded([FinishReason.STOP])
    account.failed(500)
    account.disconnected()
    assert value(metrics, "time_to_first_token_seconds_sum") == 1.0
    assert value(metrics, "inter_token_latency_seconds_sum") == 1.0
    assert value(metrics, "inter_token_latency_seconds_count") == 2
    assert value(metrics, "e2e_request_latency_seconds_sum") == 4.0
    assert value(metrics, "generation_tokens_total") == 3
    assert value(metrics, "client_disconnects_total") == 0


def test_each_answer_of_a_request_has_its_own_gaps():
    times = iter([10.0, 14.0])
    metrics = GatewayMetrics()
    account = Account(metrics, clock=lambda: next(times))
    first, second = account.watch(), account.watch()
    first(Advance("a", 1), 11.0)
    second(Advance("b", 1), 11.5)
    second(Advance("c", 1), 12.5)
    first(Advance("d", 1), 13.0)
    account.succeeded([FinishReason.STOP, FinishReason.LENGTH])
    text = metrics.text().decode()
    assert "triptych_time_to_first_token_seconds_sum 1.0" in text
    assert "triptych_inter_token_latency_seconds_sum 3.0" in text
    assert "triptych_inter_token_latency_seconds_count 2.0" in text
    assert 'triptych_request_success_total{finished_reason="length"} 1.0' in text
