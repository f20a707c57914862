"""Uniform numbers as a pure function of (seed, index)."""

from __future__ import annotations

import numpy as np

from shared.model.randomness import derived_seed, uniforms


def test_a_number_depends_on_its_own_pair_only() -> None:
    together = uniforms([3, 5, 3], [0, 0, 1])
    assert together[1] == uniforms([5], [0])[0]
    assert together[2] == uniforms([3], [1])[0]


def test_numbers_are_pinned() -> None:
    """A change here would change every seeded answer that users have seen."""
    np.testing.assert_array_equal(
        uniforms([0, 1, 2**63, -1], [0, 7, 123456, 2]),
        [0.6524484863740322, 0.24696520214533768, 0.7823759653284018, 0.510562089893682],
    )


def test_streams_fill_the_interval_evenly_and_do_not_follow_each_other() -> None:
    num = 20_000
    by_index = uniforms([42] * num, range(num))
    by_seed = uniforms(range(num), [0] * num)
    for stream in (by_index, by_seed):
        assert stream.min() >= 0.0
        assert stream.max() < 1.0
        counts = np.histogram(stream, bins=100, range=(0.0, 1.0))[0]
        chi_square = ((counts - num / 100) ** 2 / (num / 100)).sum()
        assert chi_square < 149.4  # 99.9 % of a chi-square with 99 degrees of freedom
        assert abs(np.corrcoef(stream[:-1], stream[1:])[0, 1]) < 0.03
    neighbour = uniforms([43] * num, range(num))
    assert abs(np.corrcoef(by_index, neighbour)[0, 1]) < 0.03
    assert abs(np.corrcoef(by_index[1:], neighbour[:-1])[0, 1]) < 0.03


def test_each_answer_of_a_request_has_a_seed_of_its_own() -> None:
    seeds = {derived_seed(seed, choice) for seed in range(200) for choice in range(16)}
    assert len(seeds) == 200 * 16
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert derived_seed(7, 0) == 7
    assert derived_seed(2**64 - 1, 3) == derived_seed(2**64 - 1, 3)


def test_derived_streams_are_unrelated() -> None:
    indices = range(4000)
    streams = [uniforms([derived_seed(9, choice)] * 4000, indices) for choice in range(4)]
    correlations = np.corrcoef(streams)[np.triu_indices(4, k=1)]
    assert abs(correlations).max() < 0.06
