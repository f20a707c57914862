"""Where the time went, stage by stage: measured beside simulated. Pure; in seconds, out text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.planner_load import Served
from services.planner.goodput import percentile
from shared.telemetry import names

STAGES = (
    names.INGEST,
    names.DISPATCH,
    names.MEDIA_STORE,
    names.QUEUE_ENCODE,
    names.MEDIA_FETCH,
    names.PREPROCESS,
    names.ENCODE,
    names.QUEUE_PREFILL,
    names.WAIT_EMBEDDING,
    names.TRANSFER_EMBEDDING,
    names.PREFILL,
    names.QUEUE_DECODE,
    names.TRANSFER_KV,
    names.DECODE,
)
"""In the order of a request's life."""


def stage_table(kinds: Sequence[str], served: Sequence[Served], simulated: Sequence[Served]) -> str:
    """Medians and 90th percentiles of each kind of request in milliseconds, measured / simulated;
    a stage is left out where it took neither any time."""
    lines = []
    for kind in sorted(set(kinds)):
        sides = [
            [each for each, name in zip(side, kinds, strict=True) if name == kind]
            for side in (served, simulated)
        ]
        columns = [_columns(side) for side in sides]
        lines.append(f"  {kind + ', ms measured / simulated':36}      p50                 p90")
        for stage in (*STAGES, "TTFT", "TPOT"):
            real, told = (each[stage] for each in columns)
            if any(real) or any(told):
                pairs = [f"{a:8.1f} / {b:8.1f}" for a, b in zip(real, told, strict=True)]
                lines.append(f"    {stage:32} {pairs[0]} {pairs[1]}")
    return "\n".join(lines)


def _columns(served: Sequence[Served]) -> Mapping[str, tuple[float, float]]:
    found = {stage: _ranks([each.spans_s.get(stage, 0.0) for each in served]) for stage in STAGES}
    found["TTFT"] = _ranks([each.ttft_s for each in served])
    found["TPOT"] = _ranks([each.tpot_s for each in served])
    return found


def _ranks(values: Sequence[float]) -> tuple[float, float]:
    return 1e3 * percentile(values, 0.5), 1e3 * percentile(values, 0.9)
