"""Which answers leave a worker that changes its role."""

from __future__ import annotations

from services.decode.departure import leaves


def test_an_answer_stays_only_if_it_will_be_complete_in_time() -> None:
    assert not leaves(num_remaining=10, step_s=0.05, left_s=0.6)
    assert leaves(num_remaining=20, step_s=0.05, left_s=0.6)


def test_after_the_time_everything_leaves() -> None:
    assert leaves(num_remaining=0, step_s=0.0, left_s=0.0)
    assert leaves(num_remaining=1, step_s=0.0, left_s=-1.0)
