"""Which batch sizes are captured."""

from __future__ import annotations

import pytest

from shared.errors import SettingsError
from shared.model.gpu.graph_limits import GraphLimits, PrefillGraphLimits


@pytest.mark.parametrize(
    ("max_batch", "num_buckets", "expected"),
    [
        (1, 10, (1,)),
        (2, 10, (1, 2)),
        (8, 10, (1, 2, 4, 8)),
        (9, 10, (1, 2, 4, 8, 9)),
        (100, 10, (1, 2, 4, 8, 16, 32, 64, 100)),
        (256, 3, (4, 32, 256)),
        (256, 1, (256,)),
    ],
)
def test_powers_of_two_and_the_largest(
    max_batch: int, num_buckets: int, expected: tuple[int, ...]
) -> None:
    assert GraphLimits(max_batch, 1024, num_buckets).buckets() == expected


@pytest.mark.parametrize("field", ["max_batch", "max_context_tokens", "num_buckets", "max_bytes"])
def test_a_bound_of_nothing_is_refused(field: str) -> None:
    bounds = {"max_batch": 4, "max_context_tokens": 64, "num_buckets": 2, "max_bytes": 100}
    with pytest.raises(SettingsError, match=f"{field}=0, the least is 1"):
        GraphLimits(**{**bounds, field: 0})


@pytest.mark.parametrize(
    ("max_tokens", "expected"),
    [(300, (128, 256, 300)), (256, (128, 256)), (10, (10,)), (9, ())],
)
def test_prompts_are_captured_where_they_have_more_tokens_than_sequences(
    max_tokens: int, expected: tuple[int, ...]
) -> None:
    assert PrefillGraphLimits(max_tokens, 1024, max_seqs=8).sizes() == expected


@pytest.mark.parametrize("field", ["max_tokens", "max_context_tokens", "max_seqs", "step_tokens"])
def test_a_limit_of_nothing_is_refused_for_prompts_too(field: str) -> None:
    bounds = {"max_tokens": 8, "max_context_tokens": 8}
    with pytest.raises(SettingsError, match=f"{field}=0, the least is 1"):
        PrefillGraphLimits(**{**bounds, field: 0})
