"""Drawing tokens: the right distribution, and no influence between rows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.model.randomness import uniforms
from shared.model.sampler import SamplingRow
from shared.model.sampler import sample as sample_rows


def sample(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int | None]:
    """The token ids alone."""
    return [None if each is None else each.token_id for each in sample_rows(logits, rows)]


NUM_DRAWS = 20_000
LOGITS = torch.tensor([1.0, -0.5, 2.0, 0.0, 1.5, -3.0, 0.7, 0.7])

SETTINGS = {
    "plain": SamplingRow(temperature=1.0),
    "hot": SamplingRow(temperature=2.5),
    "top_p": SamplingRow(temperature=1.0, top_p=0.7),
    "top_k": SamplingRow(temperature=0.8, top_k=3),
    "both": SamplingRow(temperature=1.3, top_k=5, top_p=0.8),
    "min_p": SamplingRow(temperature=1.0, min_p=0.2),
    "min_p and top_p": SamplingRow(temperature=1.5, min_p=0.15, top_p=0.8),
    "all": SamplingRow(temperature=1.5, min_p=0.1, top_k=5, top_p=0.9),
}


def expected_distribution(row: SamplingRow) -> torch.Tensor:
    """Written from the definition: rank, keep, renormalise."""
    probabilities = torch.softmax(LOGITS.double() / row.temperature, dim=0)
    floor = row.min_p * float(probabilities.max())
    ranked = sorted(range(len(LOGITS)), key=lambda i: (-float(LOGITS[i]), i))
    ranked = [i for i in ranked if float(probabilities[i]) >= floor]
    kept = ranked[: row.top_k] if row.top_k else ranked
    total = sum(float(probabilities[i]) for i in kept)
    result = torch.zeros(len(LOGITS), dtype=torch.float64)
    before = 0.0
    for i in kept:
        if before < row.top_p:
            result[i] = probabilities[i]
        before += float(probabilities[i]) / total
    return result / result.sum()


@pytest.mark.parametrize("name", SETTINGS)
def test_draws_follow_the_filtered_distribution(name: str) -> None:
    row = SETTINGS[name]
    rows = [replace(row, seed=9, index=i) for i in range(NUM_DRAWS)]
    drawn = torch.tensor(sample(LOGITS.expand(NUM_DRAWS, -1), rows))
    counts = torch.bincount(drawn, minlength=len(LOGITS)).double()
    expected = expected_distribution(row) * NUM_DRAWS
    assert not counts[expected == 0].any()
    possible = expected > 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 24.3  # 99.9 % of a chi-square with 7 degrees of freedom, the most there are


row_settings = st.builds(
    SamplingRow,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 5, 50, 1000]),
    top_p=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0]),
    seed=st.integers(-(2**63), 2**64 - 1),
    index=st.integers(0, 10_000),
)


@settings(deadline=None, max_examples=50)
@given(
    rows=st.lists(row_settings, min_size=1, max_size=8),
    logits_seed=st.integers(0, 1000),
    vocab_size=st.sampled_from([60, 1500]),
)
def test_a_row_does_not_depend_on_its_batch(
    rows: list[SamplingRow], logits_seed: int, vocab_size: int
) -> None:
    generator = torch.Generator().manual_seed(logits_seed)
    # Coarse steps make many equal logits, where an unstable order would show.
    logits = torch.randn(len(rows), vocab_size, generator=generator).mul(2).round()
    together = sample(logits, rows)
    alone = [sample(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    backwards = sample(logits.flip(0), rows[::-1])[::-1]
    assert together == alone == backwards


def test_greedy_takes_the_largest() -> None:
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(1))
    assert sample(logits, [SamplingRow()] * 4) == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("row", [SamplingRow(1.0, top_k=1), SamplingRow(1.0, top_p=0.0)])
def test_the_narrowest_filter_leaves_the_largest(row: SamplingRow) -> None:
    assert {sample(LOGITS[None], [replace(row, index=i)])[0] for i in range(50)} == {2}


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.full((500, 50), -torch.inf)
    logits[:, 7] = 0.0
    logits[:, 9] = -1.0
    rows = [SamplingRow(1.0, seed=3, index=i) for i in range(500)]
    assert set(sample(logits, rows)) == {7, 9}


def test_sixteen_bit_logits() -> None:
    assert 0 <= sample(LOGITS[None].bfloat16(), [SamplingRow(1.0, top_p=0.9)])[0] < 8


def test_row_counts_must_match() -> None:
    with pytest.raises(ValueError, match="2 rows of logits for 1"):
        sample(torch.zeros(2, 5), [SamplingRow()])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_has_no_token_and_spoils_no_other(bad: float) -> None:
    logits = torch.zeros(3, 8)
    logits[0, 2] = logits[2, 5] = 4.0
    logits[1, 3] = bad
    rows = [SamplingRow(), SamplingRow(temperature=1.0, top_k=4, seed=1), SamplingRow()]
    assert sample(logits, rows) == [2, None, 5]


def drawn_by_the_book(logits: np.ndarray, row: SamplingRow) -> int:
    """One draw over the whole vocabulary in float64: rank, filter, walk along the CDF."""
    weights = np.exp((logits - logits.max()) / row.temperature)
    is_ranked = 0 < row.top_k < len(logits) or row.top_p < 1.0
    order = np.lexsort((np.arange(len(logits)), -logits)) if is_ranked else np.arange(len(logits))
    if row.top_k:
        order = order[: row.top_k]
    order = order[weights[order] >= row.min_p]
    kept = weights[order] / weights[order].sum()
    if is_ranked:
        order = order[: 1 + int((np.cumsum(kept)[:-1] < row.top_p).sum())]
    cdf = np.cumsum(weights[order])
    return int(order[np.searchsorted(cdf, uniforms([row.seed], [row.index])[0] * cdf[-1], "right")])


@pytest.mark.parametrize("spread", [0.5, 3.0, 8.0])
@pytest.mark.parametrize("is_coarse", [False, True])
def test_every_draw_is_the_one_by_the_book(spread: float, is_coarse: bool) -> None:
    """Flat distributions need the whole ranking, peaked ones the narrow one; coarse ones tie."""
    generator = torch.Generator().manual_seed(1)
    rows = [
        SamplingRow(temperature, top_k, top_p, min_p, seed=index, index=index)
        for index, (temperature, top_k, top_p, min_p) in enumerate(
            itertools.product((0.4, 1.0), (0, 1, 7, 300, 2999), (0.2, 0.95, 1.0), (0.0, 0.01, 0.4))
        )
    ]
    logits = torch.randn(len(rows), 3000, generator=generator) * spread
    logits = logits.round() if is_coarse else logits
    expected = [drawn_by_the_book(logits[i].double().numpy(), row) for i, row in enumerate(rows)]
    assert sample(logits, rows) == expected
