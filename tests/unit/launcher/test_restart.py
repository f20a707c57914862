"""The restart policy, in numbers."""

import pytest

from services.launcher.restart import GiveUp, Restart, RestartHistory, RestartPolicy, after_exit

POLICY = RestartPolicy(first_delay_s=0.5, factor=2, max_delay_s=4, healthy_s=30)
READY = RestartHistory(was_ready=True)


def test_the_delay_doubles_up_to_its_ceiling() -> None:
    history, delays_s = READY, []
    for _ in range(5):
        verdict = after_exit(POLICY, history, exit_code=1, ran_s=0.1)
        assert isinstance(verdict, Restart)
        delays_s.append(verdict.delay_s)
        history = verdict.history
    assert delays_s == [0.5, 1.0, 2.0, 4.0, 4.0]


def test_a_process_that_ran_long_starts_over_with_the_first_delay() -> None:
    history = RestartHistory(failures=9, was_ready=True)
    assert after_exit(POLICY, history, exit_code=-9, ran_s=30.0) == Restart(
        0.5, RestartHistory(failures=1, was_ready=True)
    )


@pytest.mark.parametrize("exit_code", [0, 1, -9])
def test_three_failed_starts_in_a_row_are_enough(exit_code: int) -> None:
    second = RestartHistory(failures=2)
    assert after_exit(POLICY, second, exit_code, ran_s=1.0) == GiveUp(
        "3 starts in a row have failed"
    )


def test_after_it_was_ready_once_it_is_never_given_up() -> None:
    history = RestartHistory(failures=50).ready()
    assert isinstance(after_exit(POLICY, history, 1, ran_s=1.0), Restart)


def test_wrong_settings_are_not_tried_twice() -> None:
    assert after_exit(POLICY, RestartHistory(), 2, ran_s=0.3) == GiveUp(
        "its settings are wrong", is_bad_setting=True
    )
