"""Which workloads the side-by-side bench runs and tells of."""

from __future__ import annotations

import pytest

from bench.compare import Measured, report
from bench.floors import Floors, Weights
from bench.workloads import WORKLOADS, workloads_named


def test_workloads_are_chosen_by_key_in_the_tables_order() -> None:
    assert workloads_named("image-1,text-1") == (WORKLOADS[0], WORKLOADS[2])


@pytest.mark.parametrize("keys", ["text-1,text-9", ""])
def test_what_is_unknown_is_named_with_what_is_known(keys: str) -> None:
    with pytest.raises(ValueError, match=r"known: text-1, text-8, image-1, image-8"):
        workloads_named(keys)


def test_the_table_shows_only_what_was_measured() -> None:
    measured = [Measured("triptych", "text, 1 stream", 1, 900.0, 30.0, 20.0, 0.0)]
    floors = Floors(1e9, 1e9, Weights(1, 1, 0, 0, 2, 14, 2))
    assert "text, 1 stream" in report(measured, floors, 64)
    assert "picture" not in report(measured, floors, 64)
